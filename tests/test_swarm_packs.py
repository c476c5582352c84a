"""Packs on real swarms: a server that takes little at once, and a chain of servers."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks.relay import free_port, relay
from tests.tiny_models import write_tiny_model
from tests.trials import MIXED, VOCAB, Trial, make_trial, tensors
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import Packer
from tune_app.backbones.packing import Answer
from tune_app.serve.connection import PETALS_REQUEST_TOKENS
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm

pytestmark = pytest.mark.swarm

STUCK_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)


def open_swarm(folder, swarm, request_tokens=None):
    from tune_app.backbones.swarm import SwarmBackbone

    return SwarmBackbone(
        folder,
        peers=swarm.peers,
        dht_prefix=swarm.dht_prefix,
        dtype="float32",
        request_tokens=request_tokens,
    )


def ask_together(backbone, trials: list[Trial]) -> list[Answer]:
    """The answers of trials that share packs, each from a thread of its own."""
    packer = Packer(backbone)

    def ask(trial: Trial) -> Answer:
        with packer.member():
            return packer.run(trial.request())

    try:
        with ThreadPoolExecutor(len(trials)) as pool:
            return [f.result(STUCK_S) for f in [pool.submit(ask, trial) for trial in trials]]
    finally:
        packer.close()


def assert_as_alone_in_process(folder, specs, answers: list[Answer]) -> None:
    local = LocalBackbone(folder, device="cpu", dtype="float32")
    for spec, answer in zip(specs, answers, strict=True):
        trial = make_trial(local, spec)
        loss = trial.model(trial.batch)
        loss.backward()
        assert answer.loss == pytest.approx(loss.item(), rel=1e-5)
        ours = tensors(answer)
        if answer.deep_LPH is not None:
            ours[1] = ours[1].transpose(0, 1).flatten(1)
        for grad, parameter in zip(ours, trial.model.parameters(), strict=True):
            assert (grad - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max()


def test_a_server_that_takes_little_is_never_asked_for_more(folder):
    """It would refuse, and Petals' client would take that for a dead server and try again."""
    specs = [replace(spec, seed=seed) for seed in range(4) for spec in MIXED]
    with private_swarm(ServeConfig(folder, threads=1, max_batch_tokens=64)) as swarm:
        backbone = open_swarm(folder, swarm, request_tokens=64)
        try:
            answers = ask_together(backbone, [make_trial(backbone, spec) for spec in specs])
            traffic = backbone.traffic
        finally:
            backbone.close()
    assert traffic.retries == 0
    assert traffic.requests >= 2 * sum(len(spec.lengths) for spec in specs) * 8 / 64
    assert_as_alone_in_process(folder, specs, answers)


def test_several_packs_are_in_flight_on_a_chain_of_servers(folder, monkeypatch):
    import tune_app.petals_compat  # noqa: F401, I001
    from petals.utils.ping import PingAggregator

    specs = [replace(spec, seed=seed) for seed in range(4) for spec in MIXED]
    packs, second = 0, threading.Event()
    # A first measurement on a busy machine does not make the swarm a distant one.
    measured = PingAggregator.to_dict
    monkeypatch.setattr(
        PingAggregator,
        "to_dict",
        lambda self: {peer: 0.5 + s for peer, s in measured(self).items()},
    )
    with private_swarm(ServeConfig(folder, servers=2, threads=1)) as swarm:
        backbone = open_swarm(folder, swarm)
        assert backbone.limits.packs_in_flight == 2
        blocks = backbone.blocks

        def second_while_first(embeds_BSH, deep_LBPH):
            """The first pack is computed only once the second has set out as well."""
            nonlocal packs
            packs += 1
            (second.set if packs > 1 else lambda: second.wait(STUCK_S / 4))()
            return blocks(embeds_BSH, deep_LBPH)

        try:
            trials = [make_trial(backbone, spec) for spec in specs]
            monkeypatch.setattr(backbone, "limits", replace(backbone.limits, tokens_per_pack=512))
            monkeypatch.setattr(backbone, "blocks", second_while_first)
            before = backbone.traffic.requests  # it asked the servers what they are
            answers = ask_together(backbone, trials)
            traffic = backbone.traffic
        finally:
            backbone.close()
    assert second.is_set()
    assert_as_alone_in_process(folder, specs, answers)
    # Forward and backward on either server, counted for the pack that asked and not its neighbour.
    assert {answer.packs.requests for answer in answers} == {4}
    assert traffic.requests - before == 4 * packs
    assert traffic.retries == 0


def test_a_request_that_is_sent_again_is_counted(folder, monkeypatch):
    from tune_app.backbones.swarm import sequential_autograd  # Petals' own, importable after it

    ask, asked = sequential_autograd.run_remote_backward, []

    async def lost_once(*args, **kwargs):
        asked.append(args)
        if len(asked) == 1:
            raise ConnectionError("lost on the way")
        return await ask(*args, **kwargs)

    with private_swarm(ServeConfig(folder, threads=1)) as swarm:
        backbone = open_swarm(folder, swarm)
        try:
            trial = make_trial(backbone, MIXED[0])
            monkeypatch.setattr(sequential_autograd, "run_remote_backward", lost_once)
            (answer,) = ask_together(backbone, [trial])
        finally:
            backbone.close()
    assert backbone.traffic.retries == answer.packs.retries == 1
    # Forward, the lost one, and what Petals does then: forward again and backward.
    assert answer.packs.requests == 4
    assert_as_alone_in_process(folder, MIXED[:1], [answer])


def test_requests_to_a_far_server_fit_into_a_streams_window(folder, monkeypatch):
    from tune_app.backbones import swarm as module

    monkeypatch.setattr(module, "_STREAM_WINDOW", 256 * 32 * 4)  # 256 tokens of this model
    specs = [replace(spec, seed=seed) for seed in range(4) for spec in MIXED]
    with (
        relay(to=(port := free_port()), delay_ms=25) as relay_port,
        private_swarm(
            ServeConfig(folder, port=port, announce_ports=[relay_port], threads=1)
        ) as far,
    ):
        backbone = open_swarm(folder, far)
        try:
            before = backbone.traffic.requests
            with torch.no_grad():
                backbone.blocks(torch.zeros(32, 32, 32), None)
            assert backbone.traffic.requests - before == 4
            answers = ask_together(backbone, [make_trial(backbone, spec) for spec in specs])
        finally:
            backbone.close()
    assert backbone.traffic.retries == 0
    assert_as_alone_in_process(folder, specs, answers)


@pytest.mark.parametrize(
    ("pack", "token_bytes", "request_tokens"),
    [
        (4096, 128 * 4, 512),  # the demo model in float32: 256 KiB
        (1024, 4096 * 2, 128),  # Llama 7B in bfloat16: the window is 32 tokens, 8 requests the most
        (1024, 32 * 4, 1024),  # all of it fits
        (1001, 4096 * 2, 126),  # 8 requests, not 9
    ],
)
def test_a_pack_for_far_servers_is_cut(pack, token_bytes, request_tokens):
    from tune_app.backbones.swarm import tokens_per_request

    assert tokens_per_request(pack, token_bytes) == request_tokens


def test_a_server_that_is_gone_is_no_distance():
    from tune_app.backbones.swarm import farthest_s

    assert farthest_s([0.001, math.inf, 0.003]) == 0.003
    assert farthest_s([math.inf]) == 0.0


def test_what_petals_client_sends_at_once_is_known():
    """Read in a process of its own: it is set for all clients of a process."""
    import subprocess
    import sys

    program = (
        "import tune_app.petals_compat; from petals.client import sequential_autograd;"
        "print(sequential_autograd.MAX_TOKENS_IN_BATCH)"
    )
    read = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert int(read.stdout) == PETALS_REQUEST_TOKENS
