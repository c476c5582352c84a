"""Makes processes end together, however one of them ends.

hivemind forks a process for its DHT, which starts the daemon `p2pd`, and Petals' server forks one
that answers requests. If their parent is killed, they would live on, hold its sockets and accept
connections that are never served. If one of them is killed, the parent would wait for it forever.
So children end with their parent here, and on request a parent ends with its children, so that its
supervisor or Ray can start it again.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

_PR_SET_PDEATHSIG = 1


def end_with(pids: Iterable[int], *, unless: threading.Event | None = None) -> None:
    """Kills this process as soon as one of these processes has ended (it may have already), unless
    `unless` is set by then.

    A thread waits for the kernel's notification. (Linux can also signal the children of a process
    that ends, but does so when the *thread* that forked them ends, and a client may be opened in
    any thread.)
    """
    watched = select.poll()
    for pid in pids:
        try:
            watched.register(os.pidfd_open(pid), select.POLLIN)
        except ProcessLookupError:
            _end()

    def wait() -> None:
        watched.poll()
        if unless is None or not unless.is_set():
            _end()

    threading.Thread(target=wait, name="end-with", daemon=True).start()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """Kills this process as soon as `parent`, which forked it, has ended."""
    end_with([parent])
    if os.getppid() != parent:  # it had already ended, and another process may have its id by now
        _end()


def hivemind_ends_with_us() -> None:
    """From now on, processes that hivemind forks end with this process, and `p2pd` with them.

    May be called more than once.
    """
    from hivemind.dht.dht import DHT
    from hivemind.moe.server.connection_handler import ConnectionHandler

    for forked in (DHT, ConnectionHandler):
        if not hasattr(forked.run, "ends_with_parent"):
            forked.run = _ending_with_parent(forked.run)


def _ending_with_parent(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def run_until_parent_ends(self: Any) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is a forked process
        assert parent.pid is not None
        end_with_parent(parent.pid)
        # This process starts others from this thread, its main thread, which lives as long as it.
        os.register_at_fork(after_in_child=_signalled_with_parent(os.getpid()))
        run(self)

    run_until_parent_ends.ends_with_parent = True  # type: ignore[attr-defined]
    return run_until_parent_ends


def _signalled_with_parent(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # stays in force after exec
        if os.getppid() != parent:
            _end()

    return in_child


def hivemind_processes(dht: Any) -> list[int]:
    """The DHT's process, its `p2pd`, and the one that manages the memory they share with us."""
    import psutil

    ours = psutil.Process().children(recursive=True)
    below_dht = [child.pid for child in ours if dht.pid in (child.pid, child.ppid())]
    return below_dht + [child.pid for child in ours if child.name() == "torch_shm_manager"]
