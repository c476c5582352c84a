"""The benchmark of early stopping: simulated searches over known curves, and their figures."""

from __future__ import annotations

import itertools
import math

import optuna
import pytest

from benchmarks.sample_efficiency import (
    AT_ONCE,
    LR_PER_DECADE,
    Arm,
    Curve,
    Key,
    Seen,
    best_within,
    search,
    stopped_by_oracle,
    table,
    tokens_to,
)

FULL = 500


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def curves() -> dict[Key, Curve]:
    """100 tokens to each evaluation; the loss is the distance of the learning rate from 1e-2."""
    lrs = [round(10 ** (i / LR_PER_DECADE), 8) for i in range(-24, -5)]
    schedules = ["linear", "cosine", "constant_with_warmup"]
    return {
        (lr, schedule, warmup): [
            (abs(math.log10(lr) + 2) + 0.1 * (5 - at), 100 * at) for at in range(1, 6)
        ]
        for lr, schedule, warmup in itertools.product(lrs, schedules, [*range(0, 41, 10), 50])
    }


def test_the_documented_default_is_the_first_trial(curves: dict[Key, Curve]) -> None:
    curves = {key: [(9.0, tokens) for _, tokens in curve] for key, curve in curves.items()}
    curves[(1e-3, "linear", 50)][0] = (1.0, 100)
    first, *_ = search(Arm("random", "none"), 0, curves, FULL)
    assert first == Seen(best=1.0, tokens=100, best_of_first=1.0)


def test_without_stopping_every_trial_is_paid_in_full(curves: dict[Key, Curve]) -> None:
    trace = search(Arm("random", "none"), 0, curves, AT_ONCE * FULL)
    assert len(trace) == 5 * AT_ONCE
    assert trace[-1].tokens == AT_ONCE * FULL
    assert [seen.best for seen in trace] == sorted((seen.best for seen in trace), reverse=True)


def test_the_oracle_pays_one_evaluation_of_what_misses(curves: dict[Key, Curve]) -> None:
    known = stopped_by_oracle(curves, target=0.1)
    assert known[(0.01, "linear", 0)] == curves[(0.01, "linear", 0)]
    assert known[(0.001, "linear", 0)] == [(pytest.approx(1.0), 100)]
    with_oracle, without = (
        tokens_to(search(Arm("random", "none"), 2, known_to, 60 * FULL), 0.1, 60 * FULL)
        for known_to in (known, curves)
    )
    assert with_oracle < without < 60 * FULL


def test_figures_are_of_the_traces() -> None:
    def trace(tokens: int) -> list[Seen]:
        return [Seen(3.0, 50, 3.0), Seen(1.0, tokens, 2.0)]

    assert best_within(trace(200), 100) == 3.0
    assert tokens_to(trace(200), 1.0, 999) == 200
    assert tokens_to(trace(200), 0.5, 999) == 999
    arms = {"random": [trace(800), trace(1000)], "ours": [trace(300), trace(300)]}
    *_, row = table(arms, target=1.0, full=100)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["ours", "300", "300", "300 to 300", "3.0", "3.0", "1.0000", "2.0000"]
