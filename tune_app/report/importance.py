"""Which hyperparameters mattered: PED-ANOVA over the run's Optuna study.

PED-ANOVA measures how much a hyperparameter's distribution among the best trials differs from that
among all (Watanabe et al. 2023, arXiv:2304.10255); Optuna's version covers conditional parameters.
"""

from __future__ import annotations

import math
import warnings

import optuna
import pandas as pd
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from tune_app.report.results import Results

TOP = 0.25  # the share of trials that counts as best
# Optuna's documentation asks for at least 5 trials among the best: 5 / 0.25.
MIN_TRIALS = 20


def importance(results: Results) -> pd.DataFrame:
    """`_importance`, computed once for all files and pages that show it."""
    if "importance" not in results.computed:
        results.computed["importance"] = _importance(results)
    table: pd.DataFrame = results.computed["importance"]
    return table


def _importance(results: Results) -> pd.DataFrame:
    """Columns parameter, importance (they add up to 1), trials (that had it); greatest first.

    Empty if there is no study, too few trials, or a population, whose trials end with other values
    than the study has. Leaves out parameters that fewer than MIN_TRIALS complete trials had, or
    that always had the same value.
    """
    empty = pd.DataFrame(
        {"parameter": pd.Series(dtype=str), "importance": [], "trials": pd.Series(dtype=int)}
    )
    if results.population:
        return empty
    study, values = _opened(results)
    held = {
        name: len(seen)
        for name, seen in values.items()
        if len(seen) >= MIN_TRIALS and len(set(seen)) > 1
    }
    if study is None or not held:
        return empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental; few trials in a regime (left out)
        try:
            found = get_param_importances(
                study,
                evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP),
                params=list(held),
                normalize=False,
            )
        except RuntimeError:  # for example if all losses are equal
            return empty
    total = sum(found.values())
    if not total > 0:
        return empty
    rows = [(name, value / total, held[name]) for name, value in found.items()]
    table = pd.DataFrame(rows, columns=["parameter", "importance", "trials"])
    return table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def why_none(results: Results) -> str:
    """Why there is no importance, in words; "" if there is no study."""
    if results.population:
        return (
            "not available with --scheduler pbt, because trials change their hyperparameters while "
            "they train"
        )
    study, values = _opened(results)
    most = max(map(len, values.values()), default=0)
    if study is None or most >= MIN_TRIALS:
        return ""
    return f"too few complete trials ({most}, needs {MIN_TRIALS})"


def storage_url(results: Results) -> str:
    """The URL of the run's study for Optuna; "" if there is none."""
    file = results.run.study_db
    return results.settings.get("storage") or (f"sqlite:///{file}" if file.exists() else "")


def _opened(results: Results) -> tuple[optuna.Study | None, dict[str, list[object]]]:
    """`_study`, opened once."""
    if "study" not in results.computed:
        results.computed["study"] = _study(results)
    opened: tuple[optuna.Study | None, dict[str, list[object]]] = results.computed["study"]
    return opened


def _study(results: Results) -> tuple[optuna.Study | None, dict[str, list[object]]]:
    """The run's study (in `storage` of search.yaml, else in the run's own file), and for each
    parameter its values in the complete trials; early-stopped ones are not complete.

    None if there is none, or if it is damaged or from another version of Optuna.
    """
    storage, values = storage_url(results), dict[str, list[object]]()
    if not storage:
        return None, values
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(study_name=results.study, storage=storage)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.value is not None and math.isfinite(trial.value):
                for name, value in trial.params.items():
                    values.setdefault(name, []).append(value)
        return study, values
    except Exception:  # SQLAlchemy's, Optuna's or json's, by what is damaged
        return None, {}
    finally:
        optuna.logging.set_verbosity(verbosity)
