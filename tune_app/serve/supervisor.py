"""Petals servers on this machine, as a context manager; on 127.0.0.1 unless told otherwise.

The caller starts one supervisor process, which starts the servers and restarts those that end
(`server_process.py`). All of them share one process group, so one signal ends the swarm, and
nothing stays behind if the caller is killed. The caller's own process imports neither petals nor
torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tune_app.run.paths import socket_folder
from tune_app.serve.checks import check_swarm, dht_prefix_of
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.server_process import MOST_STARTS, Job, ServerSpec, at_the_same_port

_SUPERVISE = "from tune_app.serve.server_process import supervise; supervise()"
_WORD_S = 2.0  # least time between two progress messages


class PrivateSwarmError(RuntimeError):
    """A server did not start; the text is the server's own message and the end of its log."""


@dataclass(frozen=True)
class Server:
    """One running server: blocks `first_block` to `end_block - 1`, reachable at `maddrs`."""

    first_block: int
    end_block: int
    maddrs: tuple[str, ...]

    @property
    def blocks(self) -> str:
        return f"{self.first_block}:{self.end_block}"


class PrivateSwarm:
    """A swarm that starts in the background; `wait_until_ready()` before use, `stop()` at the end.

    peers: multiaddrs of all servers, each with `/p2p/<id>`, once ready
    dht_prefix: the name of the blocks that clients need
    servers: the running servers, in the order of their blocks
    blocks_missing: how many of the model's blocks they do not serve
    """

    def __init__(self, config: ServeConfig) -> None:
        """Starts the processes and returns immediately. Raises ConfigError with all mistakes found
        without importing torch."""
        layers = check_swarm(config)
        first, end = config.span(layers)
        self.blocks_missing = layers - (end - first)
        self.dht_prefix = dht_prefix_of(config.model, config.name)
        self._folder = Path(tempfile.mkdtemp(prefix="tune_app-swarm-", dir=socket_folder()))
        self._log = self._folder / "servers.log"
        self._job = _job(config, layers, self.dht_prefix, self._folder)
        self._ready: dict[int, Server] = {}
        self._loaded = [0] * config.count
        self._stopping, self._lock = False, threading.Lock()
        self._launch()

    @property
    def servers(self) -> list[Server]:
        return sorted(self._ready.values(), key=lambda server: server.first_block)

    @property
    def peers(self) -> list[str]:
        return [maddr for server in self.servers for maddr in server.maddrs]

    def _launch(self) -> None:
        receiving, sending = os.pipe()
        self._reports = Connection(receiving, writable=False)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISE, json.dumps(asdict(self._job)), str(sending)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self._folder),
                pass_fds=[sending],
                start_new_session=True,  # a separate group, so Ctrl-C reaches only the caller
            )
        os.close(sending)

    def wait_until_ready(
        self, *, timeout_s: float = 120.0, progress: Callable[[str], None] | None = None
    ) -> None:
        """Returns when all blocks can be called; raises PrivateSwarmError if that fails, or if
        there is no progress for `timeout_s`."""
        last = time.monotonic()
        said, next_word = "", last + _WORD_S
        while len(self._ready) < len(self._job.servers):
            now = time.monotonic()
            text = self._standing()
            if progress is not None and now >= next_word and text != said:
                progress(said := text)
                next_word = now + _WORD_S
            if now - last > timeout_s:
                raise PrivateSwarmError(self._failure(f"not ready within {timeout_s:g} s"))
            if not self._reports.poll(1.0):
                continue
            last = now
            try:
                kind, number, content = self._reports.recv()
            except EOFError:
                raise PrivateSwarmError(self._failure("the server processes ended")) from None
            if kind == "error":
                raise PrivateSwarmError(self._failure(content))
            self._take(kind, number, content)

    def _standing(self) -> str:
        blocks = sum(server.end_block - server.first_block for server in self._job.servers)
        return (
            f"starting the servers: {sum(self._loaded)} of {blocks} blocks loaded, "
            f"{len(self._ready)} of {len(self._job.servers)} servers ready"
        )

    def _take(self, kind: str, number: int, content: Any) -> None:
        spec = self._job.servers[number]
        if kind == "loading":
            self._loaded[number] = content
        elif kind == "ready":
            self._ready[number] = Server(spec.first_block, spec.end_block, tuple(content))

    def tell_changes(self, say: Callable[[str], None]) -> None:
        """From now on, `say` is called from a thread when a server has ended or is back.

        If the supervisor ends, it is restarted too.
        """
        threading.Thread(target=self._tell, args=(say,), name="swarm-changes", daemon=True).start()

    def _tell(self, say: Callable[[str], None]) -> None:
        supervisors = 1
        while not self._stopping:
            try:
                kind, number, content = self._reports.recv()
            except (EOFError, OSError):
                if self._stopping or supervisors > MOST_STARTS:
                    return
                supervisors += 1
                say("the swarm's servers have ended with their supervisor; restarting them")
                self._again()
                continue
            name = f"the server of blocks {self._job.servers[number].first_block}:"
            name += f"{self._job.servers[number].end_block}"
            self._take(kind, number, content)
            if kind == "ready":
                say(f"{name} is back")
            elif kind == "ended":
                why, count, again = content
                say(
                    f"{name} has ended ({why}); "
                    + (f"restarting it ({count} of {MOST_STARTS} times)" if again else "")
                    + ("" if again else f"not restarting it, since it has ended {count} times")
                )
            elif kind == "error":
                say(f"{name} did not start: {content}")

    def _again(self) -> None:
        """Restarts the supervisor, with the servers' previous ports."""
        with self._lock:
            if self._stopping:
                return
            self._process.wait()
            self._reports.close()
            servers = [
                at_the_same_port(spec, self._ready[number].maddrs)
                for number, spec in enumerate(self._job.servers)
            ]
            self._job = replace(self._job, servers=servers)
            self._launch()

    def stop(self) -> None:
        """Ends all processes of the swarm immediately and removes its temporary files."""
        with self._lock:
            self._stopping = True
            with suppress(ProcessLookupError):  # it may have ended already
                # There is nothing to save, and hivemind's own shutdown takes seconds.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reports.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _failure(self, reason: str) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-20:]
        tail = "\n".join(["", "The end of the servers' log:", *lines]) if lines else ""
        return f"The private swarm did not start: {reason}{tail}"


@contextmanager
def private_swarm(
    config: ServeConfig, *, progress: Callable[[str], None] | None = None
) -> Iterator[PrivateSwarm]:
    """A ready PrivateSwarm, stopped at the end of the block.

    Raises ConfigError (the user's mistakes) and PrivateSwarmError (a server did not start).
    """
    swarm = PrivateSwarm(config)
    try:
        swarm.wait_until_ready(progress=progress)
        yield swarm
    finally:
        swarm.stop()


def _job(config: ServeConfig, layers: int, dht_prefix: str, folder: Path) -> Job:
    keys = Path(config.identity).resolve() if config.identity else folder / "identity"
    return Job(
        model=str(Path(config.model).resolve()),
        dht_prefix=dht_prefix,
        servers=[
            ServerSpec(
                number,
                *span,
                listen=config.listen(number),
                announce=config.announce(number),
                identity=f"{keys}-{number}" if number else str(keys),
                device=config.device,
            )
            for number, span in enumerate(config.spans(layers))
        ],
        join=list(config.join),
        dtype=config.dtype,
        threads=config.threads_each,
        max_batch_tokens=config.max_batch_tokens,
        stock=config.stock,
        folder=str(folder),
        caller_pid=os.getpid(),
    )


def _environment(folder: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # works in a clone that is not installed
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "TMPDIR": socket_folder(),
        "HIVEMIND_LOGLEVEL": "WARNING",
        "PETALS_CACHE": str(folder),  # Petals keeps a lock file there
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
