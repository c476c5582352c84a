"""The importance of the hyperparameters: what mattered, and what the answer rests on."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from synthetic_runs import write_run

from tune_app.report import importance as importances
from tune_app.report.importance import MIN_TRIALS, importance
from tune_app.report.results import load
from tune_app.report.summary import summary
from tune_app.report.tables import write_tables
from tune_app.report.write import write_all
from tune_app.run.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run", trials=24)


def _study(run: RunDir, trials: int, storage: str | None = None, name: str = "tune_app") -> None:
    """lr decides, weight_decay does nothing, num_cycles exists in every third trial."""

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True)
        if trial.suggest_categorical("scheduler", ["linear", "cosine", "restarts"]) == "restarts":
            trial.suggest_int("num_cycles", 1, 8)
        return abs(math.log10(lr) + 2)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found.optimize(objective, n_trials=trials)
    study = optuna.create_study(study_name=name, storage=storage or f"sqlite:///{run.study_db}")
    study.add_trials(found.trials)  # in a file, each suggestion would wait for the disk


def test_importance_finds_what_mattered_and_says_what_it_rests_on(run: RunDir):
    assert importance(load(run)).empty  # no study
    _study(run, MIN_TRIALS + 20)
    table = importance(load(run))
    assert table["parameter"].iloc[0] == "lr"
    assert table["importance"].iloc[0] > 0.5
    assert table["importance"].sum() == pytest.approx(1)
    trials = table.set_index("parameter")["trials"]
    assert trials["lr"] == MIN_TRIALS + 20
    assert "num_cycles" not in trials  # held by fewer than MIN_TRIALS
    write_tables(run)
    assert list(pd.read_csv(run.importance_csv)["parameter"]) == list(table["parameter"])
    assert "importance (PED-ANOVA)" in summary(load(run))


def test_importance_covers_conditional_parameters_once_enough_trials_held_them(run: RunDir):
    _study(run, 90)
    assert "num_cycles" in set(importance(load(run))["parameter"])


def test_importance_is_silent_with_too_few_trials(run: RunDir):
    _study(run, MIN_TRIALS - 1)
    assert importance(load(run)).empty
    few = f"too few complete trials ({MIN_TRIALS - 1}, needs {MIN_TRIALS})"
    assert f"Hyperparameter importance: {few}.\n" in summary(load(run))


def test_importance_is_read_from_a_storage_of_the_users(run: RunDir):
    study = f"sqlite:///{run.path / 'shared.db'}"
    run.append_event({"event": "search_resumed", "study": "run-1234"})
    run.write_atomic(run.search_yaml, yaml.safe_dump({"storage": study}))
    _study(run, MIN_TRIALS, storage=study, name="run-1234")
    assert not importance(load(run)).empty


def test_it_is_computed_once_for_all_that_show_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = [], importances.get_param_importances
    monkeypatch.setattr(
        importances,
        "get_param_importances",
        lambda *given, **named: computed.append(1) or compute(*given, **named),
    )
    _study(run, 24)
    write_all(run)

    assert len(computed) == 1
