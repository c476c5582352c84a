"""Ray Tune's trial schedulers, which stop bad trials early."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from tune_app.run.trial_report import evaluation_steps, first_judged
from tune_app.search.trial_job import job_of


def build_trial_scheduler(name: str, steps: int) -> TrialScheduler:
    """Ray Tune's scheduler of that name, with rungs at steps at which trials are evaluated."""
    if name == "none":
        return FIFOScheduler()
    common: dict[str, Any] = {"time_attr": "step"}
    first = evaluation_steps(steps)[0]
    if name == "asha":
        return _never_stops_default(
            AsyncHyperBandScheduler(
                **common, max_t=steps + 1, grace_period=first_judged(steps), reduction_factor=2
            )
        )
    if name == "median":
        return _never_stops_default(
            MedianStoppingRule(**common, grace_period=first, min_samples_required=3)
        )
    return HyperBandScheduler(**common, max_t=steps + 1, reduction_factor=3)


def _never_stops_default(scheduler: TrialScheduler) -> TrialScheduler:
    """The default, in both of its forms, runs to its end: the answer is stated against it."""
    decide = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = decide(controller, trial, result)
        return TrialScheduler.CONTINUE if job_of(trial.config).is_default else decision

    scheduler.on_trial_result = on_trial_result
    return scheduler


def keeps_actors(scheduler: TrialScheduler) -> TrialScheduler:
    """Tune starts pending trials by itself, the latest in an actor that is free. A pending trial
    that its scheduler chooses is given that actor too, even while its own one starts, which is then
    thrown away: short trials would cost a process each."""
    choose = scheduler.choose_trial_to_run

    def choose_trial_to_run(controller: Any) -> Trial | None:
        trial = choose(controller)
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    scheduler.choose_trial_to_run = choose_trial_to_run
    return scheduler
