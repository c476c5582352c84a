"""The figures of benchmarks/prompt_quality: what its tables say of runs that are known."""

from __future__ import annotations

import argparse
import itertools
import statistics

import pandas as pd
import pytest

from benchmarks.prompt_quality import DECISIVE, STEPS, TASKS, Bench, Run, plan, read_runs
from benchmarks.prompt_quality_tables import DEFAULT, WORDS, _best_of, _interval, report


def frame(runs: list[tuple[Run, float, float]]) -> pd.DataFrame:
    rows = []
    for run, loss, accuracy in runs:
        figures = dict.fromkeys(("valid_loss", "test_loss"), loss)
        figures |= dict.fromkeys(("valid_accuracy", "test_accuracy"), accuracy)
        rows.append(vars(run) | figures)
    return pd.DataFrame(rows)


def test_the_plan_has_the_documented_default_and_begins_with_what_decides():
    runs = list(plan("smollm2", 3))
    assert len(set(runs)) == len(runs)
    assert {run.task for run in runs[:3]} == set(TASKS)
    expected = list(itertools.product((DEFAULT, WORDS), TASKS))
    for run, (config, task) in zip(runs[: len(expected)], expected, strict=True):
        assert (run.task, run.seed) == (task, 0)
        assert {name: getattr(run, name) for name in config} == config
    assert Run("demo", "sst2", 4, **DECISIVE[0]).config().num_warmup_steps() == STEPS
    assert all(run.config().check() == [] for run in [*runs, *plan("demo", 2)])


def test_differences_are_paired_by_seed():
    runs = []
    for seed in (0, 1):
        runs.append((Run("smollm2", "sst2", seed, **DEFAULT), 0.7 + seed, 0.5 + 0.1 * seed))
        runs.append((Run("smollm2", "sst2", seed, **WORDS), 0.5 + seed, 0.6 + 0.1 * seed))
    (line,) = [line for line in report(frame(runs)).splitlines() if "| words" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["sst2", "words, warmup a tenth", "2"]
    assert cells[-2] == "-0.200 (-0.200 to -0.200)"
    assert cells[-1] == "+0.100 (+0.100 to +0.100)"


def test_the_interval_is_students():
    assert _interval([0.1]) == "+0.100 (one seed)"
    # t(0.975, 2) = 4.303, standard deviation 0.1
    assert _interval([0.0, 0.1, 0.2]) == "+0.100 (-0.148 to +0.348)"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_of_k_is_the_mean_over_all_draws(k):
    losses, accuracies = [0.4, 0.1, 0.3, 0.2], [0.5, 0.9, 0.6, 0.8]
    runs = pd.DataFrame({"valid_loss": losses, "test_accuracy": accuracies})
    best = [
        accuracies[min(draw, key=lambda i: losses[i])]
        for draw in itertools.combinations(range(4), k)
    ]
    assert _best_of(runs, k) == f"{statistics.mean(best):.3f}"


@pytest.mark.slow
def test_a_run_is_trained_once_and_kept(tmp_path):
    file = tmp_path / "runs.csv"
    bench = Bench(argparse.Namespace(sst2=None, newsgroups=None, cache=tmp_path, model=None), file)
    run = Run("demo", "docstrings", 0, init="labels", steps=2, warmup_steps=0)
    bench.train(run)
    assert read_runs(file) == {run}
    (row,) = pd.read_csv(file).to_dict("records")
    assert 1.5 < row["valid_loss"] < 2.5
    assert 0 < row["test_accuracy"] < 0.5
    assert [bench.has(task) for task in TASKS] == [False, False, True]
