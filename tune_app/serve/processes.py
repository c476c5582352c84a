"""Processes that end together, however one of them ends.

hivemind forks a process for its DHT, which starts the daemon `p2pd`, and Petals' server forks one
that answers requests. When their parent is killed they stay, hold its sockets and take connections
that nobody serves any more. When one of them is killed the parent waits for it for ever. Here both
directions are closed: children end with their parent, and where that is asked for a parent ends
with its children, so that whoever started it (a supervisor, Ray) can start it again.
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
    """This process is killed as soon as one of these processes has ended (they may have already),
    `unless` that is set by then.

    A thread waits for the kernel's word. (The signal that Linux sends to the children of a process
    that ends is no use here: it comes when the *thread* ends that forked them, and a client may be
    opened in any thread.)
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
    """This process is killed as soon as `parent`, which has forked it, has ended."""
    end_with([parent])
    if os.getppid() != parent:  # it had ended before, and its number may be another's by now
        _end()


def hivemind_ends_with_us() -> None:
    """What hivemind forks from now on in this process ends with it, and `p2pd` with hivemind.

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
        # What this process starts, starts from this thread, which is its first and lasts as long.
        os.register_at_fork(after_in_child=_signalled_with_parent(os.getpid()))
        run(self)

    run_until_parent_ends.ends_with_parent = True  # type: ignore[attr-defined]
    return run_until_parent_ends


def _signalled_with_parent(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # stays in force in the program that it becomes
        if os.getppid() != parent:
            _end()

    return in_child


def hivemind_processes(dht: Any) -> list[int]:
    """The DHT's process, its `p2pd`, and the one that keeps the memory that they share with us."""
    import psutil

    ours = psutil.Process().children(recursive=True)
    below_dht = [child.pid for child in ours if dht.pid in (child.pid, child.ppid())]
    return below_dht + [child.pid for child in ours if child.name() == "torch_shm_manager"]
