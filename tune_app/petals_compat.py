"""Makes petals 2.2.0.post1 import on hivemind 1.1.12; import this module before petals.

Since 1.1.11 hivemind no longer re-exports, at its top level, 17 names that petals imports from
there. All of them still exist one level down, so they are put back. Needed once in every process
that imports petals. Touches no network.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module

# What these libraries print while importing is no news to the user of a pinned set of versions.
# hivemind reads its level once, at import: whoever wants more sets the variable.
os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
warnings.filterwarnings("ignore", message=r".*_register_pytree_node.*")

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

_hivemind = import_module("hivemind")
for _module, _names in _HOMES.items():
    for _name in _names:
        setattr(_hivemind, _name, getattr(import_module(_module), _name))
