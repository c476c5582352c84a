"""One text on a swarm whose servers keep the keys and values of earlier positions.

Uses Petals' `rpc_inference`, but not its client's recovery from a lost server, which omits deep
prompts and sends positions twice to the servers after the lost one. Here the whole text so far is
computed again.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import itertools
import time
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from hivemind import MSGPackSerializer, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.proto.runtime_pb2 import ExpertRequest
from petals.client.inference_session import InferenceSession
from petals.utils.misc import DUMMY, DUMMY_INT64
from petals.utils.packaging import pack_args_kwargs

from tune_app.backbones.protocol import BackboneUnavailable
from tune_app.models.parts import Ends
from tune_app.serve.reconnecting import pause_s


class SwarmSession:
    """Session of a SwarmBackbone; see the protocol."""

    def __init__(
        self, ends: Ends, manager: Any, deep_LBPH: torch.Tensor | None, most_positions: int
    ) -> None:
        self._ends, self._manager, self._deep_LBPH = ends, manager, deep_LBPH
        self._most_positions = most_positions
        self._into: list[torch.Tensor] = []  # the blocks' input so far, [B, S, H] each
        self._positions = 0
        self._servers: list[Any] = []  # Petals' sessions, in the order of their blocks
        self._opening = InferenceSession(manager, most_positions)

    @torch.no_grad()
    def extend(self, embeds_BSH: torch.Tensor) -> torch.Tensor:
        def blocks(hidden_BSH: torch.Tensor) -> torch.Tensor:
            self._into.append(hidden_BSH)
            return self._remote()

        first, self._positions = self._positions, self._positions + embeds_BSH.shape[1]
        return self._ends(embeds_BSH, blocks, first)

    def close(self) -> None:
        self._opening._exit_server_sessions(self._servers)
        self._servers = []

    def _remote(self) -> torch.Tensor:
        """The blocks' output for the positions of the last piece."""
        new_BSH = self._into[-1]
        first_failure: float | None = None
        for attempt in itertools.count():
            try:
                if self._servers:
                    return self._step(new_BSH)
                self._open()
                return self._step(torch.cat(self._into, dim=1))[:, -new_BSH.shape[1] :]
            except Exception as error:  # whatever Petals raises, it all means the same
                failure = error
            self.close()
            first_failure = first_failure or time.monotonic()
            pause = pause_s(attempt, time.monotonic() - first_failure)
            if pause is None:
                raise BackboneUnavailable(f"no server continued the text: {failure!r}") from failure
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _open(self) -> None:
        route = self._manager.make_sequence(
            0, len(self._manager), mode="min_latency", cache_tokens_needed=self._most_positions
        )
        self._servers = self._opening._enter_server_sessions(route)

    def _step(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        for server in self._servers:
            try:
                hidden_BSH = self._ask(server, hidden_BSH)
            except Exception:
                self._manager.on_request_failure(server.span.peer_id)
                raise
            self._manager.on_request_success(server.span.peer_id)
        return hidden_BSH

    def _ask(self, server: Any, hidden_BSH: torch.Tensor) -> torch.Tensor:
        """What Petals' `step` of a server's session does, without copying the text so far for each
        token. Only the first request of a session has deep prompts, and metadata that servers read.
        """
        deep, about = DUMMY, b""
        if not server.stepped:
            if self._deep_LBPH is not None:
                deep = self._deep_LBPH[server.span.start : server.span.end]
            _, structure = pack_args_kwargs(hidden_BSH, deep, DUMMY_INT64)
            told = {"session_id": server.session_id, "args_structure": structure}
            about = MSGPackSerializer.dumps(server.session_metadata | told)
        compression = server.rpc_info["inference_schema"][0][0].compression
        tensors = [
            serialize_torch_tensor(tensor, compression)
            for tensor in (hidden_BSH, deep, DUMMY_INT64)
        ]
        request = ExpertRequest(uid=server.uid, tensors=tensors, metadata=about)
        answer = RemoteExpertWorker.run_coroutine(server._step(request))
        output_BSH = deserialize_torch_tensor(answer.tensors[0])
        if output_BSH.shape != hidden_BSH.shape:
            raise ValueError(f"a server answered {output_BSH.shape} to {hidden_BSH.shape}")
        return output_BSH
