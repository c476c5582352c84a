"""The processes of a swarm's servers: the supervisor and the servers.

The supervisor imports petals once and forks a process for each server. A server that was ready and
then ends is restarted with the same address and identity, so that clients find it again. All of
them share one process group and end with their caller.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tune_app.models.import_less import import_less
from tune_app.run.threads import let_threads_sleep
from tune_app.serve.checks import answers
from tune_app.serve.processes import (
    end_with,
    end_with_parent,
    hivemind_processes,
)

# A server that has ended this many times within this time is not restarted.
MOST_STARTS, _WITHIN_S = 5, 600.0
_LONGEST_PAUSE_S = 8.0  # before a restart; 0, 1, 2, 4, 8
_LOOK_S = 0.2


@dataclass(frozen=True)
class ServerSpec:
    """One server, for blocks `first_block` to `end_block - 1`.

    number: from 0
    listen: multiaddress
    announce: multiaddress that others are told instead of `listen`
    identity: file of its private key, created if missing
    """

    number: int
    first_block: int
    end_block: int
    listen: str
    announce: str | None
    identity: str
    device: str | None

    def device_among(self, gpus: int) -> str:
        """Its device on a machine with this many GPUs: the servers take them in turn."""
        if gpus and self.device in (None, "cuda"):
            return f"cuda:{self.number % gpus}"
        return self.device or "cpu"


@dataclass(frozen=True)
class Job:
    """The supervisor's instructions. `join`: addresses of servers that are not its own."""

    model: str
    dht_prefix: str
    servers: list[ServerSpec]
    join: list[str]
    dtype: str
    threads: int
    max_batch_tokens: int
    stock: bool
    folder: str
    caller_pid: int

    @classmethod
    def from_json(cls, text: str) -> Job:
        told = json.loads(text)
        return cls(**told | {"servers": [ServerSpec(**server) for server in told["servers"]]})


@dataclass
class _Child:
    """A server's process as the supervisor sees it."""

    spec: ServerSpec
    process: BaseProcess
    news: Connection
    maddrs: tuple[str, ...] = ()
    error: str = ""
    ends: list[float] = field(default_factory=list)


class _Supervisor:
    """Starts the servers and reports to the caller, as (kind, number of the server, content):

    loading: blocks loaded so far; ready: its addresses; error: why it did not start, after which
    all end; ended: (reason, how often so far, whether it is restarted)
    """

    def __init__(self, job: Job, reports: Connection) -> None:
        self._job, self._reports = job, reports
        self._fork = multiprocessing.get_context("fork")
        self._children: list[_Child] = []
        self._served: set[int] = set()  # servers that have been ready
        self._due: dict[int, float] = {}  # when to restart them
        self._given_up: set[int] = set()

    def run(self) -> None:
        """Returns when the caller or all servers have ended, or one could not start."""
        caller = os.pidfd_open(self._job.caller_pid)
        if os.getppid() != self._job.caller_pid:
            return
        self._children.append(self._start(self._job.servers[0]))
        while True:
            ended = self._given_up.union(self._due)
            running = {n: child for n, child in enumerate(self._children) if n not in ended}
            if not running and not self._due:
                return
            next_s = min(self._due.values(), default=float("inf")) - time.monotonic()
            ready = wait(
                [
                    caller,
                    *(child.news for child in running.values()),
                    *(child.process.sentinel for child in running.values()),
                ],
                None if next_s == float("inf") else max(0.0, next_s),
            )
            if caller in ready:
                return
            for number, child in running.items():
                if child.news in ready:
                    self._listen(number, child)
                elif child.process.sentinel in ready:
                    self._has_ended(number, child)
            self._start_what_is_due()

    def _start(self, spec: ServerSpec, again: bool = False) -> _Child:
        peers = [*self._job.join, *(maddr for child in self._children for maddr in child.maddrs)]
        if again:  # perhaps as the only one, if no other is left
            peers = [maddr for maddr in peers if answers(maddr)]
        receiver, sender = self._fork.Pipe(duplex=False)
        process = self._fork.Process(
            target=_serve, args=(self._job, spec, peers, sender, os.getpid(), again)
        )
        process.start()
        sender.close()  # otherwise the end of the process would go unnoticed
        return _Child(spec, process, receiver)

    def _listen(self, number: int, child: _Child) -> None:
        try:
            kind, content = child.news.recv()
        except EOFError:
            self._has_ended(number, child)
            return
        if kind == "listening":
            child.maddrs = content
            child.spec = at_the_same_port(child.spec, content)
            if number == 0 and len(self._children) == 1:  # the others join the first
                self._children += map(self._start, self._job.servers[1:])
            return
        if kind == "error":
            child.error = content
            return
        if kind == "ready":
            self._served.add(number)
        self._reports.send((kind, number, content))

    def _has_ended(self, number: int, child: _Child) -> None:
        child.process.join()
        child.news.close()
        child.maddrs = ()
        why = child.error or _in_words(child.process.exitcode)
        if number not in self._served:
            self._reports.send(("error", number, why))
            self._given_up.update(range(len(self._job.servers)))
            return
        now = time.monotonic()
        child.ends = [*(at for at in child.ends if now - at < _WITHIN_S), now]
        count = len(child.ends)
        if count <= MOST_STARTS:
            pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (count - 2)) if count > 1 else 0.0
            self._due[number] = now + pause_s
        else:
            self._given_up.add(number)
        self._reports.send(("ended", number, (why, count, count <= MOST_STARTS)))

    def _start_what_is_due(self) -> None:
        for number, due in list(self._due.items()):
            ended = self._given_up.union(self._due)
            others = [child for n, child in enumerate(self._children) if n not in ended]
            if due > time.monotonic():
                continue
            if not all(child.maddrs for child in others):  # it can join them in a moment
                self._due[number] = time.monotonic() + _LOOK_S
                continue
            del self._due[number]
            old = self._children[number]
            self._children[number] = self._start(old.spec, again=True)
            self._children[number].ends = old.ends


def at_the_same_port(spec: ServerSpec, maddrs: Sequence[str]) -> ServerSpec:
    """The spec with the port that the server was given, if any free one was requested."""
    if spec.announce is None and spec.listen.endswith("/tcp/0"):
        port = maddrs[0].split("/tcp/")[1].partition("/")[0]
        return replace(spec, listen=spec.listen.removesuffix("0") + port)
    return spec


def _in_words(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def supervise() -> None:
    """The supervisor's process."""
    warnings.simplefilter("ignore")  # the log is for the servers' messages
    let_threads_sleep()
    import_less()
    import tune_app.serve.server  # noqa: F401 (imports petals once, before the forks)

    job = Job.from_json(sys.argv[1])
    reports = int(sys.argv[2])
    os.set_inheritable(reports, False)  # a process that inherits it would hide our end
    _Supervisor(job, Connection(reports, readable=False)).run()
    if os.getppid() != job.caller_pid:  # otherwise the caller reads the log and removes the folder
        shutil.rmtree(job.folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


# -------------------------------------------------------------------------- in a server's process


def _serve(
    job: Job, spec: ServerSpec, peers: list[str], news: Connection, supervisor: int, again: bool
) -> None:
    """Runs one Petals server until it or a process that it has started ends."""
    end_with_parent(supervisor)
    try:
        _run_server(job, spec, peers, news, again)
    except BaseException as error:
        news.send(("error", f"{type(error).__name__}: {error}"[:2000]))
        raise


def _run_server(
    job: Job, spec: ServerSpec, peers: list[str], news: Connection, again: bool
) -> None:
    import torch
    from hivemind.p2p import P2P
    from hivemind.utils.mpfuture import MPFuture

    from tune_app.serve.server import make_server

    # hivemind's locks are made when it is imported, so all servers would share them, and one that
    # is killed while it holds one would keep the others from ever answering.
    MPFuture.reset_backend()
    # Only the computing thread has more, see `fast_step`; Petals' own has as many as this one.
    torch.set_num_threads(job.threads if job.stock else 1)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{job.folder}/"  # removed with the folder
    blocks = range(spec.first_block, spec.end_block)
    server = make_server(
        job.model,
        blocks,
        dht_prefix=job.dht_prefix,
        initial_peers=peers,
        host_maddrs=[spec.listen],
        announce_maddrs=[spec.announce] if spec.announce else None,
        device=spec.device_among(torch.cuda.device_count()),
        dtype=job.dtype,
        threads=job.threads,
        max_batch_tokens=job.max_batch_tokens,
        stock=job.stock,
        loaded=lambda count: news.send(("loading", count)),
        identity_path=spec.identity,
        # Only needed if another server could have the same key; it takes a second.
        check_if_identity_free=bool(job.join) and not again,
    )
    news.send(("listening", tuple(str(maddr) for maddr in server.dht.get_visible_maddrs())))
    threading.Thread(target=_report_ready, args=(server, blocks, news), daemon=True).start()
    server.run()


def _report_ready(server: Any, blocks: range, news: Connection) -> None:
    """Reports when clients can find the blocks: Petals announces them shortly after `ready`."""
    from petals.data_structures import ServerState
    from petals.utils.dht import get_remote_module_infos

    while server.module_container is None or not server.module_container.ready.is_set():
        time.sleep(0.02)
    # A server that has lost a process cannot answer any more: it should end and be restarted.
    handlers = [handler.pid for handler in server.module_container.conn_handlers]
    end_with([*hivemind_processes(server.dht), *handlers])
    uids = server.module_uids[blocks.start : blocks.stop]
    me = server.dht.peer_id
    while True:
        infos = get_remote_module_infos(server.dht, uids, latest=True)
        states = [info.servers[me].state for info in infos if me in info.servers]
        if len(states) == len(uids) and set(states) == {ServerState.ONLINE}:
            break
        time.sleep(0.02)
    news.send(("ready", tuple(str(maddr) for maddr in server.dht.get_visible_maddrs())))
