"""Ray Tune's trials, as the recorder is told of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial

from tune_app.search.ray_tune.internals import failure_of
from tune_app.search.ray_tune.trainable import InfrastructureFailed
from tune_app.search.recorder import Recorder
from tune_app.search.trial_job import REPORT, job_of, report_of


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
        _forget_metrics(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._recorder.failed(job_of(trial.config), _reason(trial)[0])
        _forget_metrics(trial)


def _forget_metrics(trial: Trial) -> None:
    """Drops Tune's statistics of a trial that has ended, 40 KB where each report has 20 numbers:
    Tune keeps all trials until the search ends. The events have the reports."""
    trial.metric_n_steps.clear()
    trial.metric_analysis.clear()


def _reason(trial: Trial) -> tuple[str, bool]:
    """Why a trial failed, in one line, and whether it was an infrastructure failure."""
    cause = failure_of(trial)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, RayActorError):
        return "the process of the trial died", True
    return lines[-1] if lines else type(cause).__name__, isinstance(cause, InfrastructureFailed)
