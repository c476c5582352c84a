"""Ray Tune's trials, as the recorder is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.result import TIME_TOTAL_S, TRAINING_ITERATION

from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.internals import failure_of, forget_first_result
from tune_app.search.ray_tune.trainable import InfrastructureFailed
from tune_app.search.recorder import Recorder
from tune_app.search.trial_job import REPORT, job_of, report_of

_SHOWN = (TRAINING_ITERATION, TIME_TOTAL_S, OBJECTIVE)  # in Tune's table of trials (--verbose)


class RecordsTrials(tune.Callback):
    """Passes what happens to trials on to the recorder."""

    def __init__(self, recorder: Recorder, wait_if_ray_died: Callable[[], None]) -> None:
        self._recorder, self._wait_if_ray_died = recorder, wait_if_ray_died
        self._started: set[str] = set()  # Ray's ids of trials

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes; listeners hold locks

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id not in self._started:  # otherwise it continues after a failure
            self._started.add(trial.trial_id)
            self._recorder.started(job_of(trial.config))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self._recorder.reported(job_of(trial.config), result[REPORT])

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._wait_if_ray_died()
        reason, machines = _reason(trial)
        self._recorder.retried(job_of(trial.config), reason, machines=machines)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.ended(job_of(trial.config), report_of(trial.last_result))
        _forget_results(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.failed(job_of(trial.config), _reason(trial)[0])
        _forget_results(trial)


def _forget_results(trial: Trial) -> None:
    """Drops what Tune has of a trial that has ended, because it keeps all trials until the search
    ends: statistics, 40 KB where each report has 20 numbers, and most of the last result, 6 KB. The
    events have the reports."""
    trial.metric_n_steps.clear()
    trial.metric_analysis.clear()
    last = trial.run_metadata.last_result  # `trial.last_result` may ask the actor
    trial.run_metadata.last_result = {name: last[name] for name in _SHOWN if name in last}
    forget_first_result(trial)


def _reason(trial: Trial) -> tuple[str, bool]:
    """Why a trial failed, in one line, and whether it was an infrastructure failure."""
    cause = failure_of(trial)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, RayActorError):
        return "the process of the trial died", True
    return lines[-1] if lines else type(cause).__name__, isinstance(cause, InfrastructureFailed)
