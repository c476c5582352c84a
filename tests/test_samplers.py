"""The samplers in a real search over a conditional space, and what each of them learns."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest

from tests.trained import flags
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space

TRIALS = 12  # the first 8 are drawn at random


@pytest.mark.slow
def test_cmaes_searches_a_conditional_space_without_a_warning(tmp_path: Path) -> None:
    """The default sampler does in test_docs, by the line of docs/your-space.md."""
    run = RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "tune_app.search", *flags(tmp_path), "--steps", "3"]
    command += ["--executor", "in-process", "--sampler", "cmaes", "--space", "conditional"]
    command += ["--trials", str(TRIALS), "--scheduler", "none", "--confirm", "0"]

    done = subprocess.run([*command, "--out", str(run.path)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for sign in ("Warning", "[W ", "Traceback"):
        assert sign not in done.stderr
    table = pd.read_csv(run.trials_csv)
    assert sorted(table["trial"]) == list(range(TRIALS))
    assert set(table["status"]) == {"finished"}
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run.study_db}")
    for trial in study.trials:
        scheduler = trial.params.get("scheduler")
        assert ("power" in trial.params) == (scheduler == "polynomial")
        assert ("timescale" in trial.params) == (scheduler == "inverse_sqrt")
    started = [json.loads(line) for line in run.events_jsonl.read_text().splitlines()]
    kinds = {e["config"]["scheduler"] for e in started if e["event"] == "trial_started"}
    assert len(kinds) > 2


def distance(trial: optuna.Trial) -> float:
    """A loss that is lowest at lr 1e-2 and, where there are such, with many restarts."""
    lr = trial.params.get("lr", 1e-3)
    restarts = trial.params.get("num_cycles", 1)
    return abs(math.log10(lr) + 2) + 0.3 * (4 - restarts)


def best_of(sampler: optuna.samplers.BaseSampler, space: SearchSpace, trials: int) -> list[float]:
    """Losses of a study of `trials`, one after another, after the documented default."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)
    for first in space.first_trials(SearchConfig().base_trial()):
        first.enqueue(study)
    for _ in range(trials):
        trial = study.ask()
        space(trial)
        study.tell(trial, distance(trial))
    return [trial.value for trial in study.trials]


def mean_of_last(sampler: str, space: SearchSpace) -> float:
    found = [best_of(build_sampler(sampler, space, seed), space, 40)[-10:] for seed in range(5)]
    return sum(map(sum, found)) / sum(map(len, found))


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_learns_more_than_chance(sampler: str) -> None:
    """gp has tests of its own. cmaes needs two numbers that every trial has, the first ones
    included."""
    space = load_space("conditional" if sampler == "tpe" else "default")

    assert mean_of_last(sampler, space) < 0.8 * mean_of_last("random", space)


def test_conditional_parameters_are_learned_like_by_optunas_own_sampler() -> None:
    """`group=True`: the very suggestions of a study that is written with Optuna alone, and a child
    that is learned among the trials that have it."""
    space = load_space("conditional")
    own = optuna.samplers.TPESampler(
        seed=3, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
    )

    losses = best_of(build_sampler("tpe", space, 3), space, 30)

    assert losses == best_of(own, space, 30)
    ungrouped = optuna.samplers.TPESampler(
        seed=3, multivariate=True, group=False, constant_liar=True, n_startup_trials=8
    )
    assert losses != best_of(ungrouped, space, 30)
