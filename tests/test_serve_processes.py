"""Nothing outlives what it belongs to: hivemind's processes, and servers of a real swarm."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.tiny_models import write_tiny_model
from tune_app.serve import supervisor
from tune_app.serve.asking import BAN_S, MissingBlocksError, Patience, _ranges, what_is_wrong
from tune_app.serve.reconnecting import Peers, pause_s
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import PrivateSwarm, PrivateSwarmError, private_swarm

# A process with a DHT of hivemind's, opened by a thread that is gone by the time it says so.
CLIENT = """
import threading, time
import tune_app.petals_compat
from hivemind import DHT
from tune_app.serve.processes import end_with, hivemind_ends_with_us, hivemind_processes
hivemind_ends_with_us()
made = []
alone = dict(use_relay=False, use_auto_relay=False, auto_nat=False, nat_port_map=False)
opener = threading.Thread(target=lambda: made.append(DHT(start=True, **alone)))
opener.start()
opener.join()
time.sleep(0.5)
assert made[0].is_alive()
end_with(hivemind_processes(made[0]))
print("open", flush=True)
time.sleep(60)
"""


def wait_until(condition: Callable[[], object], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.swarm
@pytest.mark.parametrize("victim", ["client", "DHT", "p2pd"])
def test_a_client_and_its_processes_end_together(victim: str) -> None:
    with subprocess.Popen([sys.executable, "-c", CLIENT], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout.readline() == "open\n"
            client = psutil.Process(run.pid)
            below = client.children(recursive=True)
            p2pd = next(process for process in below if process.name() == "p2pd")
            {"client": client, "DHT": p2pd.parent(), "p2pd": p2pd}[victim].kill()
            wait_until(lambda: not any(map(is_alive, [client, *below])))
        finally:
            run.kill()


# -------------------------------------------------------------------------------- a server's death


class Steps:
    """A client that trains on a swarm, in a thread; `count` steps so far, each as the first."""

    def __init__(self, folder: Path, swarm: PrivateSwarm) -> None:
        from tune_app.backbones.swarm import SwarmBackbone

        self._backbone = SwarmBackbone(
            folder, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32"
        )
        self._over, self.count, self.wrong = threading.Event(), 0, list[str]()
        self._first = self._step()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _step(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 9, self._backbone.hidden_size, generator=generator)
        hidden.requires_grad_()
        output = self._backbone.blocks(hidden, None)
        output.pow(2).mean().backward()
        return [output.detach(), hidden.grad]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if not all(map(torch.equal, self._step(), self._first)):
                    self.wrong.append("another result")
            except Exception as error:
                self.wrong.append(str(error))
            self.count += 1

    def more(self, steps: int = 5) -> None:
        """Returns after some more steps."""
        goal = self.count + steps
        wait_until(lambda: self.count >= goal, 60)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._backbone.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def replicated(folder: Path, said: list[str]) -> Iterator[PrivateSwarm]:
    with private_swarm(ServeConfig(folder, replicas=2, threads=1)) as swarm:
        swarm.tell_changes(said.append)
        yield swarm


@pytest.fixture(scope="module")
def steps(folder: Path, replicated: PrivateSwarm) -> Iterator[Steps]:
    steps = Steps(folder, replicated)
    yield steps
    steps.close()


def servers_of(swarm: PrivateSwarm) -> list[psutil.Process]:
    below = psutil.Process(swarm._process.pid).children()
    return [process for process in below if "python" in process.name()]


@pytest.mark.swarm
@pytest.mark.parametrize("victim", ["server", "DHT", "p2pd", "handler"])
def test_a_server_ends_as_a_whole_and_comes_back_where_it_was(
    victim: str, replicated: PrivateSwarm, steps: Steps, said: list[str]
) -> None:
    peers, before = replicated.peers, len(said)
    server = servers_of(replicated)[0]
    below = server.children(recursive=True)
    p2pd = next(process for process in below if process.name() == "p2pd")
    dht = p2pd.parent()
    handler = next(p for p in server.children() if p != dht and "python" in p.name())
    {"server": server, "DHT": dht, "p2pd": p2pd, "handler": handler}[victim].kill()

    wait_until(lambda: not any(map(is_alive, [server, *below])))
    steps.more()  # of the other server
    wait_until(lambda: len(said) == before + 2, 60)
    ended, again = said[before:]
    assert "the server of blocks 0:2 has ended (killed by SIGKILL)" in ended
    assert again == "the server of blocks 0:2 is back"
    assert replicated.peers == peers
    assert steps.wrong == []


@pytest.mark.swarm
def test_a_server_that_takes_requests_and_answers_none_is_left_out(
    replicated: PrivateSwarm, steps: Steps
) -> None:
    steps.more()
    silent = servers_of(replicated)[1]
    os.kill(silent.pid, signal.SIGSTOP)  # its handler and its p2pd are as they were
    try:
        steps.more(20)
    finally:
        os.kill(silent.pid, signal.SIGCONT)
    assert steps.wrong == []


@pytest.mark.swarm
def test_another_model_under_the_same_name_is_refused(
    tmp_path: Path, replicated: PrivateSwarm
) -> None:
    other = write_tiny_model("llama", tmp_path / "tiny", seed=1)
    with (
        pytest.raises(PrivateSwarmError, match="another model under the name 'tiny-hf'"),
        private_swarm(ServeConfig(other, threads=1, join=replicated.peers)),
    ):
        pass


@pytest.mark.swarm
def test_a_server_killed_with_a_lock_of_hiveminds_does_not_hold_up_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gives the locks back that were taken in the process that the servers come from."""
    take = "from hivemind.utils.mpfuture import MPFuture, SharedBytes as S; " + "; ".join(
        f"{lock}.acquire()"
        for lock in ("MPFuture._update_lock", "MPFuture._initialization_lock", "S._lock")
    )
    supervise = f"import tune_app.petals_compat; {take}; {supervisor._SUPERVISE}"
    monkeypatch.setattr(supervisor, "_SUPERVISE", supervise)
    with private_swarm(ServeConfig(folder, replicas=2, threads=1)) as swarm:
        steps = Steps(folder, swarm)
        steps.more()
        steps.close()
    assert steps.wrong == []


# ------------------------------------------------------------------------- how long is waited for


def test_patience_follows_what_requests_have_taken() -> None:
    now = 0.0
    patience = Patience(clock=lambda: now)
    assert patience.seconds("forward", "a", 1000) == 15  # nobody has answered yet

    patience.answered("forward", "a", 1000, 0.2)
    assert patience.seconds("forward", "a", 1000) == 5  # at least
    patience.answered("forward", "a", 1000, 4.0)
    assert patience.seconds("forward", "a", 2000) == pytest.approx(4 * 4.0 * 2)
    assert patience.seconds("forward", "b", 1000) == pytest.approx(4 * 4.0)  # as others
    assert patience.seconds("backward", "a", 1000) == 15
    assert patience.seconds("forward", "a", 20_000) == pytest.approx(4 * 80)  # it takes that long


def test_patience_grows_only_with_a_server_that_is_asked_again_at_once() -> None:
    now = 100.0
    patience = Patience(clock=lambda: now)
    patience.answered("forward", "a", 1000, 0.1)
    patience.was_late("a", asked_at=95.0)
    patience.was_late("a", asked_at=95.0)  # asked together: counts once
    assert patience.seconds("forward", "a", 1000) == 10
    now = 110.0
    patience.was_late("a", asked_at=100.5)
    assert patience.seconds("forward", "a", 1000) == 20
    now += BAN_S + 1  # it has been left out meanwhile
    assert patience.seconds("forward", "a", 1000) == 5
    now = 110.0
    patience.answered("forward", "a", 1000, 0.1)
    assert patience.seconds("forward", "a", 1000) == 5


def test_what_is_wrong_is_said_without_the_public_swarm() -> None:
    def manager(*spans: list[str]) -> SimpleNamespace:
        info = SimpleNamespace(spans_containing_block=spans)
        return SimpleNamespace(state=SimpleNamespace(sequence_info=info))

    for known, blocks in ((([], ["a"], []), "0:1, 2:3"), ((["a"], ["a"]), "0:2")):
        said = what_is_wrong(manager(*known), MissingBlocksError(0))
        assert f"no server has answered for blocks {blocks} since " in said
        assert "online" in said
        assert "petals.dev" not in said
        assert "GPU" not in said


def test_ranges_of_blocks() -> None:
    assert _ranges([0, 1, 5, 7, 8]) == "0:2, 5:6, 7:9"


# --------------------------------------------------------------------- servers that come back


@pytest.fixture
def socket_of_a_server() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        yield listening


def test_a_lost_server_is_waited_for_until_it_listens(socket_of_a_server: socket.socket) -> None:
    now = itertools.count()  # a second passes with each look at the clock
    peers = Peers(clock=lambda: float(next(now)))
    port = socket_of_a_server.getsockname()[1]
    peers.connected([SimpleNamespace(peer_id="lost", addrs=[f"/ip4/127.0.0.1/tcp/{port}"])])
    assert peers.wait_for_lost() == set()

    peers.failed("lost")
    assert peers.wait_for_lost() == {"lost"}
    socket_of_a_server.listen()
    assert peers.wait_for_lost() == set()
    assert peers.lately_lost() == {"lost"}  # until it has answered
    peers.answered("lost")
    assert peers.lately_lost() == set()


def test_nobody_is_waited_for_that_cannot_be_dialled_directly_or_is_long_gone() -> None:
    now = 0.0
    peers = Peers(clock=lambda: now)
    relayed = "/ip4/127.0.0.1/tcp/1/p2p/QmcEfPaX68pBZaPAgpyWNZDdLPb3vwxAwtbhSbrvLphPct"
    peers.connected([SimpleNamespace(peer_id="relayed", addrs=[f"{relayed}/p2p-circuit"])])
    peers.connected([SimpleNamespace(peer_id="gone", addrs=["/ip4/127.0.0.1/tcp/1"])])
    peers.failed("relayed")
    assert peers.wait_for_lost() == set()
    peers.failed("gone")
    now = 61.0
    assert peers.wait_for_lost() == set()


def test_a_request_is_given_up_after_half_a_minute_and_nine_attempts() -> None:
    assert pause_s(0, 0.0) == 0.0
    assert pause_s(7, 100.0) == pause_s(50, 29.0) == 0.5
    assert pause_s(8, 30.0) is None
