"""Makes petals 2.2.0.post1 run, unchanged, on hivemind 1.1.12 and transformers 5.

Import this module before petals, once in every process. Touches no network.

Since 1.1.11 hivemind no longer re-exports some names that petals imports from its top level. All of
them still exist one level down, so they are put back.

Petals' own model classes, its loading of weights, its LoRA adapters and its throughput measurement
are written for the transformers of 2023. The rest of petals (routing, autograd, task pools, caches)
only passes tensors on. So these four are replaced by stand-ins before petals imports them, and so
is tensor_parallel, of which only a base class is used. Blocks and ends of models come from
`models/parts.py`; `serve/server.py` gives them to Petals' server.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from tune_app.run.paths import socket_folder

# hivemind reads its log level once, at import; set the variable to see more.
os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
os.environ["PETALS_IGNORE_DEPENDENCY_VERSION"] = "1"  # it asserts transformers < 4.35
# torch and multiprocessing put the sockets there that hivemind needs.
os.environ["TMPDIR"] = tempfile.tempdir = socket_folder()

_HOMES = {
    "hivemind.compression": (
        "deserialize_tensor_stream",
        "deserialize_torch_tensor",
        "serialize_torch_tensor",
    ),
    "hivemind.p2p": ("P2P", "P2PContext", "PeerID"),
    "hivemind.utils.asyncio": ("anext",),
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.nested": ("nested_compare", "nested_flatten", "nested_pack"),
    "hivemind.utils.serializer": ("MSGPackSerializer",),
    "hivemind.utils.tensor_descr": ("BatchTensorDescriptor", "TensorDescriptor"),
    "hivemind.utils.timed_storage": (
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "TimedStorage",
        "get_dht_time",
    ),
}


class TensorParallel(torch.nn.Module):
    """Base class of the blocks in Petals' server, which reads their `devices`,
    `output_device_index` and `module_shards`."""


def _replaced(*_args: Any, **_kwargs: Any) -> None:
    raise NotImplementedError("this part of petals is replaced by tune_app")


_STAND_INS: dict[str, dict[str, Any]] = {
    "petals.models": {},
    "petals.utils.peft": {"using_adapter": lambda _name: nullcontext()},
    "petals.server.from_pretrained": {"load_pretrained_block": _replaced},
    "petals.server.block_utils": {
        "get_block_size": _replaced,
        "resolve_block_dtype": lambda _config, dtype: dtype,
    },
    "petals.server.throughput": {
        "get_dtype_name": lambda dtype, _quant_type: str(dtype),
        "get_server_throughput": _replaced,
    },
    "tensor_parallel": {"TensorParallel": TensorParallel},
    "tensor_parallel.tensor_parallel": {"PerDeviceTensors": tuple},
    "tensor_parallel.slicing_configs": {"get_bloom_config": _replaced},
}


def _prepare() -> None:
    hivemind = import_module("hivemind")
    for module, names in _HOMES.items():
        for name in names:
            setattr(hivemind, name, getattr(import_module(module), name))
    for name, content in _STAND_INS.items():
        stand_in = ModuleType(name, "Replaced by tune_app.petals_compat.")
        vars(stand_in).update(content)
        sys.modules[name] = stand_in


_prepare()
