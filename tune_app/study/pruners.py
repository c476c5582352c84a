"""Optuna's pruners by the names of the trial schedulers: early stopping without Ray."""

from __future__ import annotations

import optuna

from tune_app.run.trial_report import RUNG_FACTOR, evaluation_steps, first_judged


def build_pruner(name: str, steps: int) -> optuna.pruners.BasePruner:
    """The pruner with the rule of Ray Tune's scheduler of that name, and rungs at steps after which
    trials are evaluated. Both halve at the same steps; ties may be broken differently."""
    first = evaluation_steps(steps)[0]
    match name:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first_judged(steps), reduction_factor=RUNG_FACTOR
            )
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=first - 1)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=first, max_resource=steps, reduction_factor=3
            )
    return optuna.pruners.NopPruner()
