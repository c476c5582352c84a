"""The packer with real threads: who shares a pack, who waits, and who gets which answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from tests.tiny_models import write_tiny_model
from tests.trials import MIXED, VOCAB, Spec, make_trial, tensors
from tune_app.backbones import packer as packer_module
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import Packer, run_alone
from tune_app.backbones.protocol import BackboneUnavailable, PackLimits

STUCK_S = 20.0  # far beyond what anything here takes


class Observed(LocalBackbone):
    """A local backbone that notes the rows of each pack and may be slow, fail or wait at a gate."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.packs, self.slow_s, self.error = [], 0.0, None
        self.gate = threading.Event()
        self.gate.set()

    def blocks(self, embeds_BSH, deep_LBPH):
        self.packs.append(len(embeds_BSH))
        assert self.gate.wait(STUCK_S)
        time.sleep(self.slow_s)
        if self.error is not None:
            raise self.error
        return super().blocks(embeds_BSH, deep_LBPH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)


@pytest.fixture
def backbone(folder):
    return Observed(folder, device="cpu", dtype="float32")


@contextmanager
def packing(backbone, *, in_flight: int = 1, tokens: int = 4096):
    backbone.limits = PackLimits(tokens_per_pack=tokens, packs_in_flight=in_flight)
    packer = Packer(backbone)
    try:
        yield packer
    finally:
        packer.close()


def in_threads(work, items) -> list:
    """`work(item)` in a thread each, at the same time; their results, or the first exception."""
    with ThreadPoolExecutor(len(items)) as pool:
        return [f.result(STUCK_S) for f in [pool.submit(work, item) for item in items]]


def await_true(condition) -> None:
    until = time.monotonic() + STUCK_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def requests(backbone):
    return [make_trial(backbone, spec).request() for spec in MIXED]


def as_member(packer):
    def run(request):
        with packer.member():
            return packer.run(request)

    return run


def assert_alone(backbone, request, answer):
    alone = run_alone(backbone, request)
    assert answer.loss == pytest.approx(alone.loss, rel=1e-5)
    for ours, theirs in zip(tensors(answer), tensors(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_burst_of_threads_trains_as_each_alone(backbone, in_flight):
    """16 threads x 20 steps of SGD, some of them leaving before the others."""
    specs = [replace(MIXED[i % len(MIXED)], seed=i) for i in range(16)]
    steps = [20 if i % 5 else 7 for i in range(16)]

    def train(job, packer=None):
        spec, count = job
        trial = make_trial(backbone, spec, run=packer and packer.run)
        optimizer = torch.optim.SGD(trial.model.parameters(), lr=0.05)
        for _ in range(count):
            trial.model(trial.batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in trial.model.parameters()]

    with packing(backbone, in_flight=in_flight) as packer:

        def train_packed(job):
            with packer.member():
                return train(job, packer)

        trained = in_threads(train_packed, list(zip(specs, steps, strict=True)))
        counters = packer.counters
    rows = sum(n * len(spec.lengths) for spec, n in zip(specs, steps, strict=True))
    assert counters.rows == rows == sum(backbone.packs)
    assert counters.packs == len(backbone.packs) < sum(steps) / 2  # they did share
    for job, parameters in zip(zip(specs, steps, strict=True), trained, strict=True):
        for ours, theirs in zip(parameters, train(job), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_those_who_come_together_share_a_pack(backbone, monkeypatch):
    monkeypatch.setattr(packer_module, "_LINGER_S", STUCK_S)  # on a busy machine a thread is late
    with packing(backbone) as packer, ExitStack() as members:
        for _ in MIXED:
            members.enter_context(packer.member())
        asked = requests(backbone)
        for request, answer in zip(asked, in_threads(packer.run, asked), strict=True):
            assert_alone(backbone, request, answer)
    assert max(backbone.packs) == sum(len(spec.lengths) for spec in MIXED)


def test_a_straggler_holds_nobody_up(backbone):
    """One member never asks for anything; the steps of the other take their usual time."""
    request = make_trial(backbone, MIXED[0]).request()
    with packing(backbone) as packer, packer.member(), packer.member():
        packer.run(request)  # warm
        began = time.monotonic()
        for _ in range(20):
            packer.run(request)
        assert time.monotonic() - began < 20 * 0.05


def test_members_who_leave_are_waited_for_no_more(backbone, monkeypatch):
    monkeypatch.setattr("tune_app.backbones.packer._LINGER_S", STUCK_S)
    request = make_trial(backbone, MIXED[0]).request()
    with packing(backbone) as packer, packer.member(), ThreadPoolExecutor(1) as pool:
        with packer.member():
            waits = pool.submit(packer.run, request)
            time.sleep(0.05)
            assert not waits.done()
        assert_alone(backbone, request, waits.result(STUCK_S / 2))


def test_members_who_come_are_served_while_others_are_being_computed(backbone):
    """A trial that joins in the middle of a pack is in the next one."""
    first, second = requests(backbone)[:2]
    with packing(backbone) as packer, ThreadPoolExecutor(2) as pool:
        backbone.gate.clear()
        a = pool.submit(as_member(packer), first)
        while not backbone.packs:
            time.sleep(0.001)
        b = pool.submit(as_member(packer), second)
        time.sleep(0.02)
        backbone.gate.set()
        answers = a.result(STUCK_S), b.result(STUCK_S)
        assert backbone.packs == [first.rows, second.rows]
    for request, answer in zip((first, second), answers, strict=True):
        assert_alone(backbone, request, answer)


def test_a_full_pack_waits_for_nobody(backbone, monkeypatch):
    monkeypatch.setattr("tune_app.backbones.packer._LINGER_S", STUCK_S)
    request = make_trial(backbone, MIXED[0]).request()
    limit = request.rows * request.row_tokens
    with packing(backbone, tokens=limit) as packer, packer.member(), packer.member():
        began = time.monotonic()
        packer.run(request)
        assert time.monotonic() - began < STUCK_S / 2


def test_packs_hold_what_the_limit_allows_and_large_requests_are_cut(backbone):
    small = Spec("causal-lm", "ptune", 2, (6, 6), seed=1)  # 2 rows of 8
    large = Spec("classification", "deep_ptune", 2, (6,) * 9, seed=2)
    asked = [make_trial(backbone, spec).request() for spec in [small, large, small, small]]
    with packing(backbone, tokens=32) as packer:  # 4 rows
        for request, answer in zip(asked, in_threads(as_member(packer), asked), strict=True):
            assert_alone(backbone, request, answer)
        assert packer.counters.row_slots >= packer.counters.rows == 15
        assert packer.counters.tokens == 15 * 8
    packs = backbone.packs[: packer.counters.packs]
    assert max(packs) == 4
    assert sum(packs) == 15


def test_training_and_evaluation_share_no_pack(backbone):
    trial = make_trial(backbone, MIXED[0])
    asked = [trial.request(needs_grad=i % 2 == 0) for i in range(6)]
    with packing(backbone) as packer:
        answers = in_threads(as_member(packer), asked)
    assert [answer.prompt_PH is not None for answer in answers] == [True, False] * 3
    assert len({answer.loss for answer in answers}) <= 2  # per shape of the pack


def test_counters_add_up(backbone):
    asked = requests(backbone)
    with packing(backbone, in_flight=3, tokens=40) as packer:
        began = time.monotonic()
        in_threads(as_member(packer), asked)
        counters, took = packer.counters, time.monotonic() - began
    assert counters.rows == sum(request.rows for request in asked)
    assert counters.tokens == sum(request.rows * request.row_tokens for request in asked)
    assert counters.rows <= counters.row_slots
    assert 0 < counters.active_s() <= took
    idle = counters.active_s()
    time.sleep(0.02)
    assert counters.active_s() == idle  # the clock stands while nothing is computed


def test_an_exception_reaches_the_thread_it_belongs_to(backbone):
    asked = requests(backbone)

    def broken(hidden_BTH, rows):
        raise ArithmeticError("this head is broken")

    asked[1] = replace(asked[1], head=broken)
    with packing(backbone) as packer, ThreadPoolExecutor(4) as pool, ExitStack() as members:
        for _ in asked:
            members.enter_context(packer.member())
        futures = [pool.submit(packer.run, request) for request in asked]
        with pytest.raises(ArithmeticError, match="this head is broken"):
            futures[1].result(STUCK_S)
        for i in (0, 2, 3):
            assert_alone(backbone, asked[i], futures[i].result(STUCK_S))


def test_an_unavailable_backbone_is_told_to_all_and_the_packer_goes_on(backbone):
    asked = requests(backbone)
    with packing(backbone) as packer:
        backbone.error = BackboneUnavailable("no server answered")
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(as_member(packer), request) for request in asked]:
                with pytest.raises(BackboneUnavailable):
                    future.result(STUCK_S)
        backbone.error = None
        assert_alone(backbone, asked[0], packer.run(asked[0]))


def test_a_cut_request_that_has_failed_is_computed_no_further(backbone):
    """On a swarm each further part would go through all the retries again."""
    request = make_trial(backbone, Spec("causal-lm", "ptune", 2, (6,) * 8)).request()
    backbone.error = BackboneUnavailable("no server answered")
    with packing(backbone, tokens=16) as packer, pytest.raises(BackboneUnavailable):
        packer.run(request)
    assert backbone.packs == [2]


def trials_that_came_while_a_pack_ran(backbone, packer, works):
    """Each of `works` in a thread of its own and in this order, with a pack of 4 rows before."""
    backbone.slow_s = 0.2  # so that a pack waits for the next request as long as it may
    backbone.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(as_member(packer), make_trial(backbone, MIXED[2]).request())
        while not backbone.packs:
            time.sleep(0.001)
        futures = []
        for i, work in enumerate(works):
            futures.append(pool.submit(work))
            while len(packer._waiting) <= i:
                time.sleep(0.001)
        backbone.gate.set()
        for future in [first, *futures]:
            future.result(STUCK_S)


def steps(packer, trial, *needs_grad):
    """A trial that wants gradients (True) or an evaluation (False), one after the other."""

    def work():
        with packer.member():
            for wanted in needs_grad:
                packer.run(trial.request(needs_grad=wanted))

    return work


@pytest.mark.parametrize("behind", [1, 2])
def test_trials_a_step_or_two_apart_evaluate_together(backbone, behind):
    one_row, two_rows = make_trial(backbone, MIXED[3]), make_trial(backbone, MIXED[1])
    with packing(backbone) as packer:
        ahead = steps(packer, one_row, False)
        trials_that_came_while_a_pack_ran(
            backbone, packer, [ahead, steps(packer, two_rows, *[True] * behind, False)]
        )
    assert backbone.packs == [4, *[2] * behind, 1 + 2]


def test_an_evaluation_lets_no_more_than_two_packs_go_first(backbone):
    one_row, two_rows = make_trial(backbone, MIXED[3]), make_trial(backbone, MIXED[1])
    with packing(backbone) as packer:
        trials_that_came_while_a_pack_ran(
            backbone,
            packer,
            [steps(packer, one_row, False), steps(packer, two_rows, *[True] * 4)],
        )
    assert backbone.packs == [4, 2, 2, 1, 2, 2]


def test_packs_in_flight_are_computed_at_the_same_time(backbone):
    request = make_trial(backbone, MIXED[0]).request()
    backbone.gate.clear()  # so that no pack ends before both have begun
    with packing(backbone, in_flight=2) as packer, ThreadPoolExecutor(2) as pool:
        futures = []
        for begun in (1, 2):
            futures.append(pool.submit(as_member(packer), request))
            await_true(lambda begun=begun: len(backbone.packs) == begun)
        backbone.gate.set()
        for future in futures:
            assert_alone(backbone, request, future.result(STUCK_S))


def test_idle_workers_do_not_spin(backbone):
    with packing(backbone, in_flight=4) as packer, packer.member(), packer.member():
        packer.run(make_trial(backbone, MIXED[0]).request())
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_close_answers_what_has_come_ends_the_workers_and_refuses_more(backbone):
    request = make_trial(backbone, MIXED[0]).request()
    backbone.slow_s = 0.05
    with packing(backbone, in_flight=2) as packer, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(packer.run, request) for _ in range(3)]
        while not backbone.packs:
            time.sleep(0.001)
        time.sleep(0.02)
        packer.close()
        assert not any(worker.is_alive() for worker in packer._workers)
        for future in futures:
            assert_alone(backbone, request, future.result(STUCK_S))
        with pytest.raises(RuntimeError, match="closed"):
            packer.run(request)
