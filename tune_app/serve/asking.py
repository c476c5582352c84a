"""Changes how Petals' client sends requests: how long it waits, what it sends, and its errors.

Petals' client waits 3 minutes for a server that accepts a connection and never answers, and when it
gives up, it refers to the public swarm's page. Here the wait depends on how long such requests have
taken before.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from weakref import ReferenceType, ref

import torch

import tune_app.petals_compat  # noqa: F401
from hivemind import MSGPackSerializer
from petals.client import sequential_autograd
from petals.client.routing.sequence_manager import MissingBlocksError
from petals.utils.misc import DUMMY

from tune_app.serve.reconnecting import PEERS, reconnect_soon

BAN_S = 15.0  # how long a failed server is avoided if others have its blocks; doubles each time
LOOK_FOR_SERVERS_S = 5.0  # interval of looking for new servers
_LEAST_S = 5.0  # shortest timeout of a request
_UNKNOWN_S = 15.0  # timeout if no server has answered a request yet
_MOST_S = 60.0  # longest timeout, unless such requests have taken longer
_SLACK = 4.0  # timeout, as a multiple of the slowest request so far

# Part of the version that our servers announce, and of the error if a graph is not kept (any more).
KEEPS_GRAPHS, NOT_KEPT = "+tune_app.graphs", "this graph is not kept"
# Whether a backward pass will follow the current forward pass.
BACKWARD_FOLLOWS: ContextVar[bool] = ContextVar("BACKWARD_FOLLOWS", default=False)


@dataclass
class Patience:
    """How long to wait for an answer, given how long requests of that kind have taken per token.

    If a server did not answer in time and is asked again while it should be avoided, no other
    server has its blocks, and perhaps it is only slow: then the timeout is doubled.
    """

    clock: Callable[[], float] = time.monotonic
    _slowest: dict[tuple[str, Any], float] = field(default_factory=dict)  # seconds per token
    _late: dict[Any, tuple[float, int]] = field(default_factory=dict)  # when, how often in a row

    def seconds(self, kind: str, peer: Any, tokens: int) -> float:
        rates = [rate for (of, _), rate in self._slowest.items() if of == kind]
        rate = self._slowest.get((kind, peer), max(rates, default=None))
        expected = None if rate is None else _SLACK * rate * tokens
        least = _UNKNOWN_S if expected is None else max(_LEAST_S, expected)
        at, times = self._late.get(peer, (-BAN_S, 0))
        if self.clock() - at < BAN_S:
            least *= 2**times
        return min(least, max(_MOST_S, expected or 0.0))

    def answered(self, kind: str, peer: Any, tokens: int, seconds: float) -> None:
        self._late.pop(peer, None)
        # The slowest time fades by a tenth with each request.
        before = self._slowest.get((kind, peer), 0.0)
        self._slowest[kind, peer] = max(seconds / max(tokens, 1), 0.9 * before)

    def was_late(self, peer: Any, asked_at: float) -> None:
        at, times = self._late.get(peer, (-BAN_S, 0))
        if asked_at > at:  # otherwise it was sent along with the request that was late before
            times = times + 1 if asked_at - at < BAN_S else 1
        self._late[peer] = (self.clock(), times)


@dataclass
class _Trouble:
    """Failures since the last answer of any server."""

    since: float = field(default_factory=time.time)
    attempts: int = 0
    by_peer: dict[str, str] = field(default_factory=dict)


PATIENCE = Patience()
_trouble = _Trouble()


def _patient(kind: str, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    plain = _with_graphs(kind, ask)

    async def ask_patiently(uid: Any, stub: Any, info: Any, *tensors: Any, **kwargs: Any) -> Any:
        global _trouble
        peer, tokens = stub._peer, tensors[0].shape[0] * tensors[0].shape[1]
        limit_s, began = PATIENCE.seconds(kind, peer, tokens), time.monotonic()
        try:
            answer = await asyncio.wait_for(plain(uid, stub, info, *tensors, **kwargs), limit_s)
        except Exception as error:
            _trouble.attempts += 1
            reason = str(error) or type(error).__name__
            if isinstance(error, asyncio.TimeoutError):
                PATIENCE.was_late(peer, began)
                reason = f"no answer within {time.monotonic() - began:.0f} s"
            else:
                PEERS.failed(peer)
            _trouble.by_peer[f"…{str(peer)[-6:]}"] = reason.partition("\n")[0][:120]
            raise
        PATIENCE.answered(kind, peer, tokens, time.monotonic() - began)
        PEERS.answered(peer)
        if peer not in PEERS.addresses:
            PEERS.connected(await stub._p2p.list_peers())
        _trouble = _Trouble()
        return answer

    ask_patiently.is_patient = True  # type: ignore[attr-defined]
    return ask_patiently


def ask_patiently(manager: Any) -> None:
    """Applies this to all Petals clients in this process; called for each one."""
    _managers.append(ref(manager))
    reconnect_soon(manager)
    for kind in ("forward", "backward"):
        ask = getattr(sequential_autograd, f"run_remote_{kind}")
        if not hasattr(ask, "is_patient"):
            setattr(sequential_autograd, f"run_remote_{kind}", _patient(kind, ask))


# ------------------------------------------------------------------- inputs that are not sent again

# A forward pass names the graph that its backward pass will need. If the server is ours, the
# backward pass then sends only the gradient; a server that has dropped the graph reports that.
_managers: list[ReferenceType[Any]] = []  # of the clients; several threads may open one
_pauses: dict[Any, _Pause] = {}  # by peer


@dataclass
class _Pause:
    """A server that did not keep a graph gets the inputs with the next `length` requests; this
    doubles each time."""

    left: int = 0
    length: int = 1
    most: int = 64

    def is_over(self) -> bool:
        self.left -= 1
        return self.left < 0

    def begin(self) -> None:
        self.left, self.length = self.length, min(2 * self.length, self.most)


def _keeps_graphs(peer: Any) -> bool:
    for known in _managers:
        blocks = () if (manager := known()) is None else manager.state.sequence_info.block_infos
        for block in blocks:
            if (server := block.servers.get(peer)) is not None:
                return KEEPS_GRAPHS in (server.version or "")
    return False


def _with_graphs(kind: str, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def forward(
        uid: Any, stub: Any, info: Any, hidden_BSH: torch.Tensor, *prompts: Any, **kwargs: Any
    ) -> Any:
        if BACKWARD_FOLLOWS.get():
            graph = uuid.uuid4().hex
            kwargs["metadata"] = _naming(graph, kwargs["metadata"])
            # Petals passes the same object to the backward pass.
            hidden_BSH.graph = (stub._peer, graph)  # type: ignore[attr-defined]
        return await ask(uid, stub, info, hidden_BSH, *prompts, **kwargs)

    async def backward(
        uid: Any,
        stub: Any,
        info: Any,
        hidden_BSH: torch.Tensor,
        grad_BSH: torch.Tensor,
        prompts: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        peer, graph = getattr(hidden_BSH, "graph", (None, ""))
        pause = _pauses.setdefault(peer, _Pause())
        if peer == stub._peer and _keeps_graphs(peer) and pause.is_over():
            named = kwargs | {"metadata": _naming(graph, kwargs["metadata"])}
            try:
                answer = await ask(uid, stub, info, DUMMY, grad_BSH, DUMMY, **named)
            except Exception as error:
                if NOT_KEPT not in str(error):
                    raise
                pause.begin()
            else:
                _pauses.pop(peer, None)
                return answer
        return await ask(uid, stub, info, hidden_BSH, grad_BSH, prompts, **kwargs)

    return forward if kind == "forward" else backward


def _naming(graph: str, metadata: bytes) -> bytes:
    return MSGPackSerializer.dumps(MSGPackSerializer.loads(metadata) | {"graph": graph})


# -------------------------------------------------------------------------------------- messages


def what_is_wrong(manager: Any, error: Exception) -> str:
    """Which blocks no server answers for, since when, and what has been tried; one line."""
    known = manager.state.sequence_info.spans_containing_block
    missing = [block for block, spans in enumerate(known) if not spans]
    which = f"blocks {_ranges(missing)}" if missing else f"blocks 0:{len(known)}"
    since = time.strftime("%H:%M:%S", time.localtime(_trouble.since))
    parts = [f"no server has answered for {which} since {since} ({_seconds_since()} s)"]
    if _trouble.by_peer:
        tried = ", ".join(f"server {peer} ({why})" for peer, why in _trouble.by_peer.items())
        parts.append(f"asked {_trouble.attempts} times: {tried}")
    elif missing or isinstance(error, MissingBlocksError):  # its text is about the public swarm
        parts.append("the peers know of no server that is online and has them")
    else:
        parts.append(str(error).partition("\n")[0][:200] or type(error).__name__)
    parts.append(f"the client looks for new servers every {LOOK_FOR_SERVERS_S:g} s")
    return "; ".join(parts)


def _seconds_since() -> int:
    return round(time.time() - _trouble.since)


def _ranges(blocks: Sequence[int]) -> str:
    """`0:2, 5:6` for 0, 1 and 5."""
    found = []
    for _, group in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        run = [block for _, block in group]
        found.append(f"{run[0]}:{run[-1] + 1}")
    return ", ".join(found)
