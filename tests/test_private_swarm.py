"""The private swarm: real servers on a tiny model, and that nothing is left of them afterwards."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.relay import free_port, relay
from tests.tiny_models import write_tiny_model
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.serve import connection
from tune_app.serve.cli import main
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.server_process import ServerSpec
from tune_app.serve.supervisor import PrivateSwarm, PrivateSwarmError, dht_prefix_of, private_swarm

TOKENS_BT = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def connect(model):
    """A function that opens a client to a swarm; closed at the end of the test."""
    from tune_app.backbones.swarm import SwarmBackbone

    opened = []

    def open_client(swarm):
        opened.append(
            SwarmBackbone(model, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32")
        )
        return opened[-1]

    yield open_client
    for client in opened:
        client.close()


def logits(backbone):
    return backbone.logits(backbone.blocks(backbone.embed(TOKENS_BT), None))


def _processes_of(group: int) -> list[int]:
    """Living (not zombie) processes of a process group."""
    listed = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and stat[0] != "Z"]


def _wait_until(condition, timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.swarm
def test_two_servers_give_the_local_models_logits(model, connect):
    said = []
    with private_swarm(ServeConfig(model, servers=2), progress=said.append) as swarm:
        assert [(s.first_block, s.end_block) for s in swarm.servers] == [(0, 1), (1, 2)]
        assert all(peer.startswith("/ip4/127.0.0.1/tcp/") for peer in swarm.peers)
        client, local = connect(swarm), AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            remote, expected = logits(client), local(TOKENS_BT).logits
        torch.testing.assert_close(remote, expected, rtol=0, atol=1e-5)
        group, folder = swarm._process.pid, swarm._folder
        assert len(_processes_of(group)) >= 5
    assert _wait_until(lambda: not _processes_of(group))
    assert not folder.exists()
    assert said == sorted(set(said))  # each state told once


@pytest.mark.swarm
def test_relay_slows_a_round_trip_by_twice_its_delay(model, connect):
    port = free_port()
    with (
        relay(to=port, delay_ms=100) as relay_port,
        private_swarm(ServeConfig(model, port=port, announce_ports=[relay_port])) as swarm,
    ):
        assert f"/tcp/{relay_port}/" in swarm.peers[0]
        client = connect(swarm)
        with torch.no_grad():
            logits(client)
            started = time.perf_counter()
            logits(client)
        assert 0.2 <= time.perf_counter() - started < 0.4


@pytest.mark.swarm
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes while the client does")
def test_a_second_pack_is_in_flight_only_where_it_hides_something(model):
    from tune_app.backbones.swarm import SwarmBackbone

    def packs_in_flight(swarm):
        backbone = SwarmBackbone(
            model, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32"
        )
        backbone.close()
        return backbone.limits.packs_in_flight

    with private_swarm(ServeConfig(model, threads=1)) as one_server_here:
        assert packs_in_flight(one_server_here) == 1
    with private_swarm(ServeConfig(model, servers=2, threads=1)) as chain:
        assert packs_in_flight(chain) == 2
    port = free_port()
    with (
        relay(to=port, delay_ms=50) as relay_port,
        private_swarm(ServeConfig(model, port=port, announce_ports=[relay_port], threads=1)) as far,
    ):
        assert packs_in_flight(far) == 4


@pytest.mark.swarm
@pytest.mark.parametrize(("end", "code"), [("SIGINT", 0), ("SIGTERM", 0), ("SIGKILL", -9)])
def test_command_leaves_nothing_behind(model, end, code):
    command = [sys.executable, "-m", "tune_app.serve", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "Press Ctrl-C to stop the servers.\n")
            printed = "".join(lines)
            search = f"python -m tune_app.search --model {model} --request-tokens 4096 --peers "
            assert search + "/ip4/127.0.0.1/tcp/" in printed
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
            )
            group = int(children.stdout)
            assert len(_processes_of(group)) >= 4  # supervisor, server, DHT, p2pd
            process.send_signal(getattr(signal, end))
            assert process.wait(10) == code
        finally:
            process.kill()  # leaving the block waits for the process
    assert _wait_until(lambda: not _processes_of(group))


@pytest.mark.swarm
def test_servers_own_message_at_once(model):
    started = time.monotonic()
    with (
        pytest.raises(PrivateSwarmError, match="nosuchdevice"),
        private_swarm(ServeConfig(model, device="nosuchdevice")),
    ):
        pass
    assert time.monotonic() - started < 30


@pytest.mark.swarm
def test_killed_supervisor_is_reported(model):
    swarm = PrivateSwarm(ServeConfig(model))
    try:
        os.kill(swarm._process.pid, signal.SIGKILL)
        with pytest.raises(PrivateSwarmError, match="processes ended"):
            swarm.wait_until_ready(timeout_s=30)
    finally:
        swarm.stop()


def test_mistakes_are_told_together(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            PrivateSwarm(ServeConfig(model, servers=3, replicas=0, port=port, dtype="flot32"))
    servers, replicas, dtype, in_use = caught.value.messages
    assert "servers must be from 1 to 2" in servers
    assert "replicas must be at least 1" in replicas
    assert "Did you mean 'float32'?" in dtype
    assert f"port {port} on 127.0.0.1 is in use" in in_use


def test_mistakes_about_several_machines_are_told_together(model):
    with pytest.raises(ConfigError) as caught:
        PrivateSwarm(
            ServeConfig(
                model,
                blocks=(1, 9),
                host="192.0.2.1",  # an address of nobody's
                join=["/ip4/127.0.0.1/tcp/1/p2p/12D3KooW", "127.0.0.1:31337"],
            )
        )
    blocks, address, silent, malformed = caught.value.messages
    assert blocks == "blocks must be FIRST:END within 0:2 (the model's blocks), got 1:9."
    assert "must be one of this machine's" in address
    assert "no answer from /ip4/127.0.0.1/tcp/1/p2p/12D3KooW" in silent
    assert "got '127.0.0.1:31337'" in malformed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen", "31337"], "must be ADDRESS:PORT, such as 10.1.2.3:31337, got '31337'"),
        (["--blocks", "0-2"], "must be FIRST:END, such as 0:16, got '0-2'"),
        (["--listen", "127.0.0.1:1", "--port", "2"], "not allowed with argument"),
    ],
)
def test_what_the_command_does_not_understand(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["demo", *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_servers_take_a_machines_gpus_in_turn():
    def devices(asked, gpus):
        spec = ServerSpec(0, 0, 1, "/ip4/127.0.0.1/tcp/0", None, "key", asked)
        return [replace(spec, number=number).device_among(gpus) for number in range(3)]

    assert devices(None, 2) == devices("cuda", 2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cuda:1", 2) == ["cuda:1"] * 3
    assert devices("cpu", 2) == ["cpu"] * 3
    assert devices(None, 0) == ["cpu"] * 3


@pytest.mark.parametrize("device", [None, "cpu", "cuda:1"])
def test_a_searchs_private_swarm_is_on_the_searchs_device(device, model, monkeypatch):
    """Without one, servers take a GPU if there is one, as in process."""
    started = []
    monkeypatch.setattr(connection, "PrivateSwarm", started.append)
    connection.start_private_swarm(SearchConfig(device=device), model, progress=lambda text: None)
    assert [config.device for config in started] == [device]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9999), "cut short|not a"),
    ],
)
def test_unusable_model_folder(tmp_path, spoil, message):
    folder = write_tiny_model("llama", tmp_path / "tiny")
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        PrivateSwarm(ServeConfig(folder))


def test_no_such_folder(tmp_path):
    with pytest.raises(ConfigError, match="must be a folder"):
        PrivateSwarm(ServeConfig(tmp_path / "nowhere"))


def test_dht_prefix_follows_petals_rule_for_hub_names(tmp_path):
    for name, family, expected in [
        ("Llama-2-7b-hf", "llama", "Llama-2-7b-hf"),
        ("Llama-3.1-8B", "llama", "Llama-3-1-8B-hf"),
        ("my model.v2", "llama", "my-model-v2-hf"),
        ("falcon-40b", "falcon", "falcon-40b"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"model_type": "{family}"}}')
        assert dht_prefix_of(folder) == expected
    cached = tmp_path / "Llama-2-7b-hf"  # where a hub name is given, the folder's name is a hash
    assert dht_prefix_of(cached, "org/my-llama") == "my-llama-hf"
    assert dht_prefix_of(cached, str(cached)) == "Llama-2-7b-hf"
