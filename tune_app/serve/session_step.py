"""A client's request to a server that keeps a text's keys and values.

Petals' own copies the text so far for each token, and sends metadata that servers do not read.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from hivemind import MSGPackSerializer, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.proto.runtime_pb2 import ExpertRequest
from petals.client.inference_session import _ServerInferenceSession
from petals.utils.misc import DUMMY, DUMMY_INT64
from petals.utils.packaging import pack_args_kwargs

# Petals' sessions also close themselves when they are collected as garbage, and wait for that. Any
# thread may collect them, the one that closes them included, which then waits for itself for ever.
_ServerInferenceSession.__del__ = lambda _session: None


def ask(server: Any, hidden_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
    """The output of the server's blocks for the next S positions, [B, S, H].

    server: Petals' session with it
    deep_LBPH: the deep prompts of all blocks; sent with the first positions only
    """
    deep, about = DUMMY, b""
    if not server.stepped:
        if deep_LBPH is not None:
            deep = deep_LBPH[server.span.start : server.span.end]
        _, structure = pack_args_kwargs(hidden_BSH, deep, DUMMY_INT64)
        told = {"session_id": server.session_id, "args_structure": structure}
        about = MSGPackSerializer.dumps(server.session_metadata | told)
    compression = server.rpc_info["inference_schema"][0][0].compression
    given = (hidden_BSH, deep, DUMMY_INT64)  # the last: another order of the rows
    tensors = [serialize_torch_tensor(tensor, compression) for tensor in given]
    request = ExpertRequest(uid=server.uid, tensors=tensors, metadata=about)
    answer = RemoteExpertWorker.run_coroutine(server._step(request))
    output_BSH = deserialize_torch_tensor(answer.tensors[0])
    if output_BSH.shape != hidden_BSH.shape:
        raise ValueError(f"a server answered {output_BSH.shape} to {hidden_BSH.shape}")
    return output_BSH
