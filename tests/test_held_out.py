"""The benchmark of held-out tasks: simulated searches over known curves, and their tables."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest

from benchmarks import held_out
from benchmarks.curves import TASKS, Point, append, read
from benchmarks.held_out import PRIOR, tables
from benchmarks.simulated_search import End, Study, World, best_of, curve_at, search, tokens_to
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import deciding_steps, evaluation_steps
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.study.yaml_space import load_space

SPACE = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler: {space: choice, categories: [linear, constant_with_warmup]}
  warmup_steps: {space: qrandint, lower: 0, upper: 20, q: 20}
"""


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """100 tokens to each evaluation; the loss is the distance of the learning rate from 1e-2."""
    (tmp_path / "space.yaml").write_text(SPACE)
    lrs = [10 ** (i / 4) for i in range(-16, -3)]
    keys = [*itertools.product(lrs, ["linear", "constant_with_warmup"], [0, 20])]
    curves = {
        key: [(abs(math.log10(key[0]) + 2) + 0.1 * (5 - at), 100 * at) for at in range(1, 6)]
        for key in [*keys, (1e-3, "linear", 50)]
    }
    return World("made up", curves, 50, 8, load_space(str(tmp_path / "space.yaml")))


def test_every_search_runs_the_default_first_and_pays_for_all_evaluations(world) -> None:
    ends = search(world, Study(world, 0, "random", None), at_once=4, most=8)
    assert sorted(end.trial for end in ends) == list(range(8))
    (first,) = (end for end in ends if end.trial == 0)
    assert first.config == world.base
    assert first.loss == pytest.approx(1.0)
    assert max(end.tokens for end in ends) == 8 * 500


def test_a_stopped_trial_is_no_answer_and_costs_less(world) -> None:
    asha = build_trial_scheduler("asha", 50)
    ends = search(world, Study(world, 1, "random", asha), at_once=4, most=16)
    assert 4 <= len(ends) < 16
    assert any(end.trial == 0 for end in ends)
    assert max(end.tokens for end in ends) < 16 * 500


def test_what_an_evaluation_that_decides_nothing_says_changes_no_search(world) -> None:
    """So few rows are enough there."""
    deciding, steps = deciding_steps("asha", 50), evaluation_steps(50)
    noisy = {
        key: [
            (loss if steps[at] in deciding else loss + math.sin(1e6 * loss), tokens)
            for at, (loss, tokens) in enumerate(curve)
        ]
        for key, curve in world.curves.items()
    }
    for seed in range(3):
        found = [
            search(
                w, Study(w, seed, "tpe", build_trial_scheduler("asha", 50), {"lr": PRIOR}), 4, 20
            )
            for w in (world, replace(world, curves=noisy))
        ]
        assert found[0] == found[1]


def test_a_config_that_was_not_recorded_lies_between_those_that_were(world) -> None:
    """The loss of this world is linear in the exponent, so what is between is known exactly."""
    between = replace(world.base, lr=10**-2.9, scheduler="constant_with_warmup", warmup_steps=3)
    assert [loss for loss, _ in world.curve(between)] == pytest.approx([1.3, 1.2, 1.1, 1.0, 0.9])
    assert [tokens for _, tokens in world.curve(between)] == [100, 200, 300, 400, 500]
    assert world.gain(0.0) == pytest.approx(1.0)
    assert world.gain(1.0) == pytest.approx(0.0)


def test_beside_a_config_that_diverged_and_outside_the_grid_the_nearest_counts(world) -> None:
    known = [key for key in world.curves if key[1:] == ("linear", 0)]
    highest = max(known)
    curves = {key: world.curves[key] for key in known} | {highest: [(20.0, 100)]}
    losses = [curve_at((lr, "linear", 0), curves)[-1][0] for lr in (0.06, 0.09, 0.5, 1e-5)]
    assert losses == pytest.approx([0.75, 20.0, 20.0, 2.0])


def test_who_foresees_the_ends_stops_what_will_not_reach_the_target(world) -> None:
    foreseen = held_out.Foreseen(*(getattr(world, f.name) for f in fields(world)), target=0.5)
    lengths = [
        len(foreseen.curve(replace(world.base, lr=lr, warmup_steps=0)))
        for lr in (10**-2.6, 10**-2.4)
    ]
    assert lengths == [1, 5]
    assert len(foreseen.curve(world.base)) == 5


def test_earlier_searches_on_other_tasks_begin_a_warm_start(world, monkeypatch) -> None:
    monkeypatch.setattr(held_out, "world", lambda name: world)
    ends = search(world, held_out.WAYS["warm start"](world, 0), at_once=1, most=6)
    assert min(end.loss for end in ends if end.trial in (1, 2)) < 0.3
    assert held_out.earlier_tasks("kind") == ["docstrings", "code"]


def test_tables_are_of_the_ends(world, monkeypatch) -> None:
    monkeypatch.setattr(held_out, "world", lambda name: world)
    config = TrialConfig()

    def ends(tokens: int) -> list[End]:
        return [End(0, 1.0, 500, config), End(3, 0.5, tokens, config), End(20, 0.0, 9000, config)]

    assert best_of(ends(1), 16) == 0.5
    assert tokens_to(ends(700), 0.5, 99) == 700
    assert tokens_to(ends(700), -1.0, 99) == 99
    # The target is what random search ends at after 24 trials: 0, which it has after 9,000 tokens.
    found = {("t", "random", 4): [ends(800)], ("t", "default", 4): [[End(1, 0.0, 3000, config)]]}
    lines = tables(found, ["t"])
    assert "| default | 3.0 | 3.0 |" in lines
    assert "| random | 50/50/100 | 50/50/100 |" in lines


def test_recorded_curves_are_read_as_they_were_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.curves.FILE", tmp_path / "curves.csv")
    points = [Point(10, 99, 2.0, 1.5, math.nan, (1.0, 1.25, 1.5))]
    append("kind", (1e-2, "linear", 20), points)
    ((key, (read_point,)),) = read(tmp_path / "curves.csv")["kind"].items()
    assert key == (1e-2, "linear", 20)
    assert read_point.parts == points[0].parts
    assert math.isnan(read_point.averaged)
    assert len(TASKS["kind"].grid()) == 41


def test_syne_tune_has_the_same_default(world) -> None:
    pytest.importorskip("syne_tune")
    ends = search(world, held_out.WAYS["BOHB, Syne Tune"](world, 0), at_once=2, most=8)
    assert any(end.config == world.base for end in ends)
