"""The blocks on a Petals swarm, reached through Petals' own client.

Embeddings, final norm and head are small and run in this process, in the swarm's dtype.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from hivemind import DHT
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from petals import ClientConfig, RemoteSequential
from petals.client import sequential_autograd
from petals.utils.ping import ping_parallel

from tune_app.backbones.protocol import (
    PACK_TRAFFIC,
    BackboneUnavailable,
    PackLimits,
    SwarmHealth,
    Traffic,
)
from tune_app.backbones.swarm_session import SwarmSession
from tune_app.models.load_parts import load_ends
from tune_app.models.parts import Ends
from tune_app.serve.asking import (
    BACKWARD_FOLLOWS,
    BAN_S,
    LOOK_FOR_SERVERS_S,
    ask_patiently,
    what_is_wrong,
)
from tune_app.serve.checks import dht_prefix_of
from tune_app.serve.connection import PETALS_REQUEST_TOKENS
from tune_app.serve.processes import end_with, hivemind_ends_with_us, hivemind_processes

# Petals retries forever and looks for new servers once a minute. A search should instead continue
# with the servers that are left, and fail with a reason if there are none.
_CLIENT = {
    "max_retries": None,  # `serve/reconnecting.py` gives up after half a minute,
    "request_timeout": 180,  # and `serve/asking.py` has shorter timeouts
    "update_period": LOOK_FOR_SERVERS_S,
    "ban_timeout": BAN_S,
    "show_route": False,
}
# As Petals makes it, but for what hivemind adds: a client listens nowhere, so it neither looks for
# a router that would let others in (with packets to the whole network) nor asks how it is reached.
_CLIENT_DHT = {
    "client_mode": True,
    "num_workers": 32,
    "startup_timeout": 20,
    "auto_nat": False,
    "nat_port_map": False,
}
CONNECT_TIMEOUT_S = 25.0
_FAR_S = 0.02  # round trip from which a swarm counts as distant
# How often a long round trip is measured again: on a busy machine even loopback seems distant.
_MEASURED_AGAIN = 3
# A libp2p stream takes this many bytes before the receiver must allow more, which costs a round
# trip (yamux's initial window). Every request has its own stream.
_STREAM_WINDOW = 256 * 2**10
_FAR_PACKS = 4  # in flight: 16 trials at 100 ms take 26 s with 2, 22 with 4, 24 with 8
_MOST_REQUESTS = 8  # that a pack is split into; each is a separate pass for the server


@dataclass
class _Config(ClientConfig):
    num_hidden_layers: int = 0


class SwarmBackbone:
    """Backbone over Petals' `RemoteSequential`; see the protocol.

    Raises BackboneUnavailable if the peers do not answer or do not serve every block.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        peers: Sequence[str],
        dht_prefix: str | None,
        dtype: str,
        request_tokens: int | None = None,
    ) -> None:
        """request_tokens: how many tokens servers accept in one request, which they do not
        announce; applies to all clients of this process. None: PETALS_REQUEST_TOKENS"""
        self.dtype, self.device = getattr(torch, dtype), torch.device("cpu")
        self._model = load_ends(model, self.dtype)
        self._ends = Ends(self._model)
        config = self._model.config.get_text_config()
        self.hidden_size, self.num_blocks = config.hidden_size, config.num_hidden_layers
        self._prefix = dht_prefix or dht_prefix_of(model)
        hivemind_ends_with_us()
        try:
            self._sequence = RemoteSequential(
                _Config(
                    initial_peers=list(peers),
                    dht_prefix=self._prefix,
                    num_hidden_layers=self.num_blocks,
                    **_CLIENT,
                ),
                dht=DHT(initial_peers=list(peers), start=True, **_CLIENT_DHT),
            )
        except Exception as error:  # hivemind raises several unrelated types here
            raise BackboneUnavailable(f"no peer answers at {', '.join(peers)}: {error}") from error
        self._manager = self._sequence.sequence_manager
        self._closing = threading.Event()
        ask_patiently(self._manager)
        self.traffic = Traffic()
        self._count_traffic()
        self._wait_until_served()
        # A pack is at most what servers accept in one request: with larger packs every trial would
        # only wait longer for its part.
        tokens = request_tokens or PETALS_REQUEST_TOKENS
        if self._round_trip_s() < _FAR_S:
            in_flight, at_once = 1 if self._is_one_server_here(peers) else 2, tokens
        else:
            in_flight = _FAR_PACKS
            at_once = tokens_per_request(tokens, self.hidden_size * self.dtype.itemsize)
        sequential_autograd.MAX_TOKENS_IN_BATCH = at_once
        self.limits = PackLimits(tokens_per_pack=tokens, packs_in_flight=in_flight)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self._ends.words(tokens_BT)

    def blocks(self, embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
        return self._ends(embeds_BSH, partial(self._remote_blocks, deep_LBPH))

    def logits(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self._ends.head(hidden_BTH)

    def session(self, deep_LBPH: torch.Tensor | None, most_positions: int) -> SwarmSession:
        return SwarmSession(self._ends, self._manager, deep_LBPH, most_positions)

    def _remote_blocks(
        self, deep_LBPH: torch.Tensor | None, hidden_BSH: torch.Tensor
    ) -> torch.Tensor:
        deep_needs = deep_LBPH is not None and deep_LBPH.requires_grad
        follows = torch.is_grad_enabled() and (hidden_BSH.requires_grad or deep_needs)
        token = BACKWARD_FOLLOWS.set(follows)
        try:
            return _RemoteBlocks.apply(hidden_BSH, deep_LBPH, self._sequence)
        finally:
            BACKWARD_FOLLOWS.reset(token)

    def health(self) -> SwarmHealth:
        spans = self._manager.state.sequence_info.spans_by_priority  # of servers that are online
        served = {block for span in spans for block in range(span.start, span.end)}
        return SwarmHealth(len({span.peer_id for span in spans}), len(served))

    def end_process_with_client(self) -> None:
        """From now until `close`, kills this process if a hivemind process that the client needs
        has ended; for processes that are restarted then."""
        end_with(hivemind_processes(self._manager.dht), unless=self._closing)

    def close(self) -> None:
        self._closing.set()
        # In any other order, hivemind complains about a closed event loop at interpreter exit.
        self._manager.shutdown()
        RemoteExpertWorker.run_coroutine(self._manager.state.p2p.shutdown())
        self._manager.dht.shutdown()

    def _round_trip_s(self) -> float:
        """To the farthest server. The shortest of several measurements counts if one was long: the
        answer may have waited for a busy processor."""
        measured = self._manager.ping_aggregator.to_dict()
        for _ in range(_MEASURED_AGAIN):
            if farthest_s(measured.values()) < _FAR_S:
                break
            again = self._manager.dht.run_coroutine(partial(ping_parallel, list(measured)))
            measured = {peer: min(seconds, again[peer]) for peer, seconds in measured.items()}
        return farthest_s(measured.values())

    def _is_one_server_here(self, peers: Sequence[str]) -> bool:
        """Whether one server on this machine's CPUs runs all blocks: a second pack in flight would
        then hide no latency and only slow down the first."""
        here = all(peer.startswith(("/ip4/127.", "/ip6/::1/")) for peer in peers)
        route = self._manager.make_sequence(0, self.num_blocks, mode="max_throughput")
        return here and len(route) == 1 and not torch.cuda.is_available()

    def _count_traffic(self) -> None:
        """Counts requests to servers: the client's manager is notified of each answer and failure,
        in the context (`contextvars`) of the requesting thread."""
        succeeded, failed = self._manager.on_request_success, self._manager.on_request_failure

        def on_success(peer_id: Any) -> None:
            for traffic in (self.traffic, PACK_TRAFFIC.get()):
                traffic.requests += 1
            succeeded(peer_id)

        def on_failure(peer_id: Any) -> None:
            for traffic in (self.traffic, PACK_TRAFFIC.get()):
                traffic.requests += 1
                traffic.retries += 1
            failed(peer_id)

        self._manager.on_request_success = on_success
        self._manager.on_request_failure = on_failure

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            try:
                self._manager.make_sequence(0, self.num_blocks, mode="max_throughput")
                self._manager.rpc_info  # noqa: B018 (a lazy property that asks a server once)
                return
            except Exception as error:
                if time.monotonic() > deadline:
                    self.close()
                    raise BackboneUnavailable(
                        f"the swarm does not serve all {self.num_blocks} blocks of "
                        f"{self._prefix!r}: {what_is_wrong(self._manager, error)}"
                    ) from error
                time.sleep(0.5)


def farthest_s(round_trips: Iterable[float]) -> float:
    """The longest round trip. Petals gives unreachable servers infinity, which does not count."""
    return max(filter(math.isfinite, round_trips), default=0.0)


def tokens_per_request(tokens_per_pack: int, token_bytes: int) -> int:
    """Padded tokens of one request if round trips are long: as many as fit into a stream's initial
    window, but at most `_MOST_REQUESTS` requests for a pack. These are sent concurrently.
    """
    least = -(-tokens_per_pack // _MOST_REQUESTS)
    return min(tokens_per_pack, max(_STREAM_WINDOW // token_bytes, least))


class _RemoteBlocks(torch.autograd.Function):
    """Petals' autograd function, whose failures become BackboneUnavailable.

    Petals raises whatever the last attempt raised; after its retries, all of it means the same.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None, sequence: Any
    ) -> torch.Tensor:
        ctx.manager = sequence.sequence_manager
        ctx.inner_inputs = (
            hidden_BSH.detach().requires_grad_(),
            None if deep_LBPH is None else deep_LBPH.detach().requires_grad_(),
        )
        try:
            with torch.enable_grad():
                ctx.inner_output = sequence(ctx.inner_inputs[0], prompts=ctx.inner_inputs[1])
        except Exception as error:
            reason = what_is_wrong(ctx.manager, error)
            raise BackboneUnavailable(f"forward pass: {reason}") from error
        return ctx.inner_output.detach()

    @staticmethod
    def backward(ctx: Any, grad_BSH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [tensor for tensor in ctx.inner_inputs if tensor is not None]
        try:
            grads = torch.autograd.grad(ctx.inner_output, inputs, grad_BSH)
        except Exception as error:
            reason = what_is_wrong(ctx.manager, error)
            raise BackboneUnavailable(f"backward pass: {reason}") from error
        return grads[0], grads[1] if len(grads) == 2 else None, None
