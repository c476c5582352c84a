"""A private Petals swarm on 127.0.0.1, as a context manager and as a command.

    python -m tune_app.serve MODEL_FOLDER --servers 2

The caller starts one supervisor process. It imports petals once, then forks one process per server;
all of them (with hivemind's own processes and `p2pd` daemons) share one process group, so ending
the swarm is one signal, and nothing stays behind when the caller is killed: supervisor and servers
watch their parent. The caller's own process imports neither petals nor torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tune_app.run.search_config import ConfigError
from tune_app.serve.checks import DTYPES, check_swarm, dht_prefix_of

_PARENT_CHECK_S = 0.3
_SUPERVISE = "from tune_app.serve.supervisor import _supervise; _supervise()"


class PrivateSwarmError(RuntimeError):
    """A server did not start; the text is the server's own message and the end of its log."""


@dataclass(frozen=True)
class Server:
    """One running server: blocks `first_block` to `end_block - 1`, reachable at `maddrs`."""

    first_block: int
    end_block: int
    maddrs: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """What the supervisor is told."""

    model: str
    dht_prefix: str
    spans: list[tuple[int, int]]
    ports: list[int]  # 0: any free one
    announce_ports: list[int]  # empty: the servers' own
    device: str | None
    dtype: str
    threads: int
    max_batch_tokens: int
    folder: str
    caller_pid: int


class PrivateSwarm:
    """A swarm that starts in the background; `wait_until_ready()` before use, `stop()` at the end.

    peers: multiaddrs of all servers, each with `/p2p/<id>`, once ready
    dht_prefix: what clients have to ask for
    servers: the running servers, in the order of their blocks
    max_batch_tokens: rows times tokens (prompts included) a request may have; Petals' client takes
        the refusal of a larger one for a dead server and retries it for ever
    """

    def __init__(
        self,
        model: str | Path,
        *,
        servers: int = 1,
        replicas: int = 1,
        port: int = 0,
        announce_ports: Sequence[int] = (),
        device: str | None = "cpu",
        dtype: str = "float32",
        threads: int | None = None,
        max_batch_tokens: int = 8192,
    ) -> None:
        """Starts the processes and returns at once.

        model: folder with config.json and weights of a causal language model
        servers: parts that the blocks are divided into; each part is served `replicas` times
        port: of the first server, the next ones take the next ports; 0: free ones
        announce_ports: what the servers tell others instead of their ports (a relay's), one each
        device: as torch names it; None: cuda where there is one
        threads: of torch in each server; None: all processors, divided by the servers
        Raises ConfigError with all mistakes found without importing torch.
        """
        layers = check_swarm(model, servers, replicas, port, announce_ports, device, dtype)
        model = Path(model).resolve()
        count = servers * replicas
        edges = [i * layers // servers for i in range(servers + 1)]
        spans = [span for span in pairwise(edges) for _ in range(replicas)]
        self.dht_prefix = dht_prefix_of(model)
        self.max_batch_tokens = max_batch_tokens
        self.servers: list[Server] = []
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="tune_app-swarm-"))
        self._log = self._folder / "servers.log"
        job = _Job(
            model=str(model),
            dht_prefix=self.dht_prefix,
            spans=spans,
            ports=[port + i if port else 0 for i in range(count)],
            announce_ports=list(announce_ports),
            device=device,
            dtype=dtype,
            threads=threads or max(1, (os.cpu_count() or 1) // count),
            max_batch_tokens=max_batch_tokens,
            folder=str(self._folder),
            caller_pid=os.getpid(),
        )
        receiving, sending = os.pipe()
        self._reports = Connection(receiving, writable=False)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISE, json.dumps(asdict(job)), str(sending)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self._folder),
                pass_fds=[sending],
                start_new_session=True,  # a group of its own; Ctrl-C reaches only the caller
            )
        os.close(sending)

    @property
    def peers(self) -> list[str]:
        return [maddr for server in self.servers for maddr in server.maddrs]

    def wait_until_ready(
        self, *, timeout_s: float = 120.0, progress: Callable[[str], None] | None = None
    ) -> None:
        """Returns when all blocks can be called; raises PrivateSwarmError if that fails."""
        started = time.monotonic()
        said = -1
        while len(self.servers) < self._count:
            waited_s = time.monotonic() - started
            if progress is not None and waited_s > 2 and said < len(self.servers):
                said = len(self.servers)
                progress(f"Starting the private swarm: {said} of {self._count} servers ready")
            if waited_s > timeout_s:
                raise PrivateSwarmError(self._failure(f"not ready within {timeout_s:g} s"))
            if not self._reports.poll(1.0):
                continue
            try:
                kind, content = self._reports.recv()
            except EOFError:
                raise PrivateSwarmError(self._failure("the server processes ended")) from None
            if kind == "error":
                raise PrivateSwarmError(self._failure(content))
            self.servers.append(Server(*content))
        self.servers.sort(key=lambda server: server.first_block)

    def stop(self) -> None:
        """Ends all processes of the swarm at once and removes its temporary files."""
        with suppress(ProcessLookupError):  # it may have ended by itself
            # Nothing is worth saving, and hivemind's own shutdown takes seconds.
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
    model: str | Path,
    *,
    timeout_s: float = 120.0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[PrivateSwarm]:
    """A ready PrivateSwarm (which see for `options`), stopped at the end of the block.

    Raises ConfigError (the user's mistakes) and PrivateSwarmError (a server did not start).
    """
    swarm = PrivateSwarm(model, **options)
    try:
        swarm.wait_until_ready(timeout_s=timeout_s, progress=progress)
        yield swarm
    finally:
        swarm.stop()


# ------------------------------------------------------------------- in the swarm's own processes


def _environment(folder: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # works in a clone that is not installed
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": path,
        "HIVEMIND_LOGLEVEL": "WARNING",
        # Threads that wait for work by spinning take the client's and the handlers' processor: on 2
        # cores 2 threads do 178 rows/s then, and 300 if they sleep.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PETALS_CACHE": str(folder),  # Petals keeps a lock file there
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def _supervise() -> None:
    """Imports petals, forks the servers, stays until the caller is gone or all servers are."""
    warnings.simplefilter("ignore")  # the log is for what the servers say
    import tune_app.serve.server  # noqa: F401 (petals, before the forks, so that it is paid once)

    job = _Job(**json.loads(sys.argv[1]))
    reports = Connection(int(sys.argv[2]), readable=False)
    fork = multiprocessing.get_context("fork")
    first_peers, first_sends = fork.Pipe(duplex=False)
    initial_peers: list[str] = []
    servers = []
    for number in range(len(job.spans)):
        arguments = (job, number, initial_peers, reports, first_sends)
        server = fork.Process(target=_serve, args=arguments)
        server.start()
        servers.append(server)
        while number == 0 and server.is_alive() and not initial_peers:
            if first_peers.poll(_PARENT_CHECK_S):
                initial_peers = first_peers.recv()
        if not initial_peers:
            break  # the first one has said why
    while os.getppid() == job.caller_pid and any(server.is_alive() for server in servers):
        time.sleep(_PARENT_CHECK_S)
    _end_group(job)


def _end_group(job: _Job) -> None:
    if os.getppid() != job.caller_pid:  # else the caller reads the log and removes the folder
        shutil.rmtree(job.folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _serve(
    job: _Job, number: int, initial_peers: list[str], reports: Connection, first: Connection
) -> None:
    """One Petals server, until it is killed."""
    supervisor = os.getppid()
    threading.Thread(target=_die_with, args=(supervisor,), daemon=True).start()
    try:
        _run_server(job, number, initial_peers, reports, first)
    except BaseException as error:
        reports.send(("error", f"{type(error).__name__}: {error}"[:2000]))
        raise


def _run_server(
    job: _Job, number: int, initial_peers: list[str], reports: Connection, first: Connection
) -> None:
    import torch
    from hivemind.p2p import P2P

    from tune_app.serve.server import make_server

    torch.set_num_threads(job.threads)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{job.folder}/"  # removed with the folder
    announce = job.announce_ports[number] if job.announce_ports else None
    start, end = job.spans[number]
    server = make_server(
        job.model,
        range(start, end),
        dht_prefix=job.dht_prefix,
        initial_peers=initial_peers,
        host_maddrs=[f"/ip4/127.0.0.1/tcp/{job.ports[number]}"],
        announce_maddrs=[f"/ip4/127.0.0.1/tcp/{announce}"] if announce else None,
        device=job.device,
        dtype=job.dtype,
        max_batch_tokens=job.max_batch_tokens,
    )
    maddrs = tuple(str(maddr) for maddr in server.dht.get_visible_maddrs())
    if number == 0:
        first.send(list(maddrs))
    waiting = threading.Thread(
        target=_report_ready, args=(server, (start, end, maddrs), reports), daemon=True
    )
    waiting.start()
    server.run()


def _report_ready(server: Any, content: tuple, reports: Connection) -> None:
    """Reports once clients can find the blocks: Petals announces them a little after `ready`."""
    from petals.data_structures import ServerState
    from petals.utils.dht import get_remote_module_infos

    while server.module_container is None or not server.module_container.ready.is_set():
        time.sleep(0.02)
    start, end, _ = content
    uids = server.module_uids[start:end]
    me = server.dht.peer_id
    while True:
        infos = get_remote_module_infos(server.dht, uids, latest=True)
        states = [info.servers[me].state for info in infos if me in info.servers]
        if len(states) == len(uids) and set(states) == {ServerState.ONLINE}:
            break
        time.sleep(0.02)
    reports.send(("ready", content))


def _die_with(supervisor: int) -> None:
    while os.getppid() == supervisor:
        time.sleep(_PARENT_CHECK_S)
    os.killpg(0, signal.SIGKILL)


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.serve",
        description="Serves a model's blocks by Petals servers on 127.0.0.1, until Ctrl-C.",
    )
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--servers", type=int, default=1, help="parts the blocks are divided into")
    parser.add_argument("--replicas", type=int, default=1, help="servers for each part")
    parser.add_argument("--port", type=int, default=0, help="of the first server; 0: a free one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; without: cuda where there is one")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with private_swarm(progress=lambda text: print(text, flush=True), **vars(args)) as swarm:
            for server in swarm.servers:
                print(f"blocks {server.first_block}:{server.end_block}  {' '.join(server.maddrs)}")
            print("\nSearch on it from another terminal:\n")
            print(
                f"  python -m tune_app.search --model {args.model} "
                f"--request-tokens {swarm.max_batch_tokens // 2} --peers {' '.join(swarm.peers)}"
            )
            print("\nCtrl-C ends the swarm.", flush=True)
            signal.pause()
    except (ConfigError, PrivateSwarmError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        pass
    return 0
