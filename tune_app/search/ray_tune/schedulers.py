"""Ray Tune's trial schedulers, which stop bad trials early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from tune_app.run.trial_report import RUNG_ENDS, RUNG_KNOWS, evaluation_steps, rung_of
from tune_app.search.trial_job import job_of

_RUNG = 1  # the step that Ray's ASHA is told, however long the trial is


class KeepsActors(TrialScheduler):
    """Makes a scheduler choose paused trials only; must come before Ray's class among the bases.

    Tune starts pending trials on its own and hands a free actor to the newest one. If the scheduler
    also picks a pending trial, that trial takes the free actor while its own actor is still
    starting; Tune then kills the new actor, so short trials would cost one process each.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        trial = super().choose_trial_to_run(tune_controller)
        return trial if trial is not None and trial.status == Trial.PAUSED else None


class KeepsDefault(KeepsActors):
    """The documented default always runs to its end, because the best config is compared with
    it."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if job_of(trial.config).is_default else decision


class _InTurn(KeepsActors, FIFOScheduler):
    pass


class Asha(KeepsDefault, AsyncHyperBandScheduler):
    """Ray Tune's, with one rung, which ends no trial while it knows but a few.

    judged_at: the step after which a trial of so many steps is judged; a space may have trials of
        different lengths
    """

    def __init__(self, judged_at: Callable[[int], int] = rung_of) -> None:
        super().__init__(
            time_attr="step",
            grace_period=_RUNG,
            max_t=_RUNG + 1,
            reduction_factor=1 / (1 - RUNG_ENDS),
        )
        self._judged_at, self._known = judged_at, 0

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("step") != self._judged_at(job_of(trial.config).config.steps):
            return TrialScheduler.CONTINUE  # there are no further rungs, and no end at `max_t`
        decision = super().on_trial_result(tune_controller, trial, result | {"step": _RUNG})
        self._known += 1
        return decision if self._known > RUNG_KNOWS else TrialScheduler.CONTINUE


class _Median(KeepsDefault, MedianStoppingRule):
    pass


class _HyperBand(KeepsActors, HyperBandScheduler):
    pass


def build_trial_scheduler(name: str, steps: int) -> TrialScheduler:
    """Ray Tune's scheduler of that name, with rungs at steps after which trials are evaluated."""
    if name == "asha":
        return Asha()
    if name == "median":
        first = evaluation_steps(steps)[0]
        return _Median(time_attr="step", grace_period=first, min_samples_required=3)
    if name == "hyperband":
        return _HyperBand(time_attr="step", max_t=steps + 1, reduction_factor=3)
    return _InTurn()
