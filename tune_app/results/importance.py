"""Which hyperparameters mattered: PED-ANOVA over the run's Optuna study.

PED-ANOVA asks how differently a hyperparameter is distributed among the best trials than among all
(Watanabe et al. 2023, arXiv:2304.10255); Optuna's form of it covers conditional parameters.
"""

from __future__ import annotations

import math
import warnings

import optuna
import pandas as pd
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from tune_app.results.frames import Results

STUDY_NAME = "tune_app"
TOP = 0.25  # the share of trials that counts as the best
# Optuna's documentation asks for at least 5 trials among the best: 5 / 0.25.
MIN_TRIALS = 20
RULE = (
    f"shown from {MIN_TRIALS} complete trials with more than one value of the hyperparameter, "
    f"so that the best {TOP:.0%} are at least {int(MIN_TRIALS * TOP)}"
)


def importance(results: Results) -> pd.DataFrame:
    """Columns parameter, importance (they add up to 1), trials (that held it); greatest first.

    Empty where there is no study or too few trials; a parameter that fewer than MIN_TRIALS trials
    held is left out.
    """
    empty = pd.DataFrame(
        {"parameter": pd.Series(dtype=str), "importance": [], "trials": pd.Series(dtype=int)}
    )
    storage = _storage(results)
    if storage is None:
        return empty
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        trials = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if trial.value is not None and math.isfinite(trial.value)
        ]
        values: dict[str, list[object]] = {}
        for trial in trials:
            for name, value in trial.params.items():
                values.setdefault(name, []).append(value)
        held = {
            name: len(seen)
            for name, seen in values.items()
            if len(seen) >= MIN_TRIALS and len(set(seen)) > 1
        }
        if not held:
            return empty
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental; few trials in a regime (left out)
            found = get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP),
                params=list(held),
                normalize=False,
            )
    except (SQLAlchemyError, KeyError, RuntimeError):
        return empty  # cut off while written, not a study, or of another version of Optuna
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(found.values())
    if not total > 0:
        return empty
    rows = [(name, value / total, held[name]) for name, value in found.items()]
    frame = pd.DataFrame(rows, columns=["parameter", "importance", "trials"])
    return frame.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def _storage(results: Results) -> str | None:
    """The study's URL: `storage` of search.yaml, else the run's own file where it exists."""
    if results.settings.get("storage"):
        return str(results.settings["storage"])
    study = results.run.study_db
    return f"sqlite:///{study}" if study.exists() else None
