"""Optuna's pruners by the names of the trial schedulers: early stopping without Ray."""

from __future__ import annotations

import numpy as np
import optuna

from tune_app.run.trial_report import RUNG_ENDS, RUNG_KNOWS, evaluation_steps, rung_of


class Asha(optuna.pruners.BasePruner):
    """What Ray Tune's ASHA does at its one rung (search/ray_tune/schedulers.py). Optuna's own ends
    half of the trials at least."""

    def __init__(self, steps: int) -> None:
        """steps: of trials whose config is not among their attributes"""
        self._steps = steps

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        rung = self._rung_of(trial)
        if trial.last_step != rung:
            return False
        others = [
            other.intermediate_values[at]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and (at := self._rung_of(other)) in other.intermediate_values
        ]
        if len(others) < RUNG_KNOWS:
            return False
        loss = trial.intermediate_values[rung]
        return bool(loss > np.percentile(others, 100 * (1 - RUNG_ENDS)))

    def _rung_of(self, trial: optuna.trial.FrozenTrial) -> int:
        return rung_of(trial.user_attrs.get("config", {}).get("steps", self._steps))


def build_pruner(name: str, steps: int) -> optuna.pruners.BasePruner:
    """The pruner with the rule of Ray Tune's scheduler of that name, and rungs at steps after which
    trials are evaluated; ties may be broken differently."""
    first = evaluation_steps(steps)[0]
    match name:
        case "asha":
            return Asha(steps)
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=first - 1)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=first, max_resource=steps, reduction_factor=3
            )
    return optuna.pruners.NopPruner()
