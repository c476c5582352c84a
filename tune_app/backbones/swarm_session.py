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
from petals.client.inference_session import InferenceSession

from tune_app.backbones.protocol import BackboneUnavailable
from tune_app.models.parts import Ends
from tune_app.serve.reconnecting import pause_s
from tune_app.serve.session_step import ask


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
                hidden_BSH = ask(server, hidden_BSH, self._deep_LBPH)
            except Exception:
                self._manager.on_request_failure(server.span.peer_id)
                raise
            self._manager.on_request_success(server.span.peer_id)
        return hidden_BSH
