"""Finds servers again as soon as they listen again.

After a dial that failed, libp2p refuses to dial that address for 5 s, and longer each time. A
server that is restarted on the same machine listens after less than a second. So while a server
that was lost does not accept plain connections, nobody dials it. And hivemind's DHT forgets a peer
that does not answer: without its only peer it would find nothing any more. So they are introduced
to each other again.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import asyncio
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import tune_app.petals_compat  # noqa: F401
from petals.client.routing import sequence_manager
from petals.data_structures import RemoteModuleInfo

from tune_app.serve.checks import answers

_LOOK_S = 0.1
_MOST_S = 2.0  # how long one search for servers waits for those that were lost
_FORGOTTEN_S = 60.0  # after which a lost server is dialled like any other
_ANSWER_S = 1.0
# A request is repeated this often, and for this long: within half a minute a server of a small
# model can restart, and so can the process that looks after it.
_ATTEMPTS, _PATIENCE_S = 9, 30.0
_LONGEST_PAUSE_S = 0.5  # between two attempts


@dataclass
class Peers:
    """The peers that this process has been connected to.

    addresses: where each can be dialled directly, with its id at the end (`/p2p/<id>`)
    lost: when the last request to a peer failed, other than by taking too long
    """

    clock: Callable[[], float] = time.monotonic
    addresses: dict[Any, list[str]] = field(default_factory=dict)
    lost: dict[Any, float] = field(default_factory=dict)

    def connected(self, infos: Iterable[Any]) -> None:
        """infos: hivemind's PeerInfo of all peers that this process is connected to now"""
        for info in infos:
            direct = [str(maddr) for maddr in info.addrs if "p2p-circuit" not in str(maddr)]
            self.addresses[info.peer_id] = [f"{maddr}/p2p/{info.peer_id}" for maddr in direct]

    def failed(self, peer: Any) -> None:
        self.lost[peer] = self.clock()

    def answered(self, peer: Any) -> None:
        self.lost.pop(peer, None)

    def lately_lost(self) -> set[Any]:
        recently = self.clock() - _FORGOTTEN_S
        return {peer for peer, since in list(self.lost.items()) if since > recently}

    def wait_for_lost(self) -> set[Any]:
        """Returns when all peers that were lost accept connections, or a moment has passed: those
        that do not."""
        deadline = self.clock() + _MOST_S
        while silent := {peer for peer in self.lately_lost() if not self._may_listen(peer)}:
            if self.clock() > deadline:
                return silent
            time.sleep(_LOOK_S)
        return set()

    def _may_listen(self, peer: Any) -> bool:
        known = self.addresses.get(peer)
        return not known or any(answers(maddr, _ANSWER_S) for maddr in known)


PEERS = Peers()


def pause_s(attempt: int, failing_s: float) -> float | None:
    """How long to wait after this attempt (from 0) of a request that has been failing for so long;
    None: give up."""
    if attempt + 1 >= _ATTEMPTS and failing_s >= _PATIENCE_S:
        return None
    return min(attempt / 4, _LONGEST_PAUSE_S)


def reconnect_soon(manager: Any) -> None:
    """Applies this to a Petals client; its config must have no `max_retries`."""
    _wait_before_looking()
    known = ref(manager)
    first_failure: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # of each request

    def retry_delay(attempt: int) -> float:
        """Petals calls this where it handles an attempt's error, which goes on to its caller if
        this raises."""
        now = time.monotonic()
        try:
            since = first_failure.setdefault(asyncio.current_task(), now)
        except RuntimeError:  # no request, but a client's first question, which its caller repeats
            since = now - _PATIENCE_S
        pause, error = pause_s(attempt, now - since), sys.exception()
        if pause is None and error is not None:
            raise error
        if isinstance(error, sequence_manager.MissingBlocksError) and (of := known()) is not None:
            of.update(wait=False)  # soon, also where there is a server that is still starting
        return pause or 0.0

    manager.get_retry_delay = retry_delay


async def _introduce(peers: Collection[Any], dht: Any, node: Any) -> None:
    """In the DHT's process: it asks these peers again."""
    for peer in peers:
        if await node.protocol.call_ping(peer) is not None:
            node.blacklist.register_success(peer)


def _wait_before_looking() -> None:
    look = sequence_manager.get_remote_module_infos
    if hasattr(look, "waits"):
        return

    def look_when_peers_listen(dht: Any, uids: Sequence[Any], **options: Any) -> Any:
        silent = PEERS.wait_for_lost()
        if silent and not PEERS.addresses.keys() - silent:  # nobody is left to be asked
            return [RemoteModuleInfo(uid=uid, servers={}) for uid in uids]
        if back := PEERS.lately_lost() - silent:
            dht.run_coroutine(partial(_introduce, back))
        return look(dht, uids, **options)

    look_when_peers_listen.waits = True  # type: ignore[attr-defined]
    sequence_manager.get_remote_module_infos = look_when_peers_listen
