"""What Ray Tune tells of its trials, written into the run directory while it happens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial

from tune_app.run.events import EventLog, TrialEnded, TrialReported, TrialRetried, TrialStarted
from tune_app.run.run_dir import Status
from tune_app.run.trial_report import outcome
from tune_app.search.ray_tune.trainable import MachinesFailed
from tune_app.search.ray_tune.trial_job import REPORT, job_of, report_of


class Recorder(tune.Callback):
    """Writes what Ray Tune tells of its trials as events.

    stop: whether the search is ending; a trial interrupted by that gets no `trial_ended` event.
    """

    def __init__(self, log: EventLog, stop: Callable[[], bool]) -> None:
        self._log, self._stop = log, stop
        self._started: set[str] = set()  # Ray's ids of trials

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes; listeners hold locks

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id in self._started:  # it is retried after a failure
            return
        self._started.add(trial.trial_id)
        job = job_of(trial.config)
        self._log.record(
            TrialStarted(trial=job.number, origin=job.origin, config=job.config, of=job.of)
        )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self._log.record(TrialReported(trial=job_of(trial.config).number, report=result[REPORT]))

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        reason, machines = _reason(trial)
        number = job_of(trial.config).number
        self._log.record(TrialRetried(trial=number, reason=reason, machines=machines))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        status, reason = outcome(report_of(trial.last_result), job_of(trial.config).config.steps)
        if status != Status.STOPPED or not self._stop():
            self._end(trial, status, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(trial, Status.FAILED, _reason(trial)[0])

    def _end(self, trial: Trial, status: Status, reason: str) -> None:
        number = job_of(trial.config).number
        self._log.record(TrialEnded(trial=number, status=status, reason=reason))


def _reason(trial: Trial) -> tuple[str, bool]:
    """Why a trial failed, in one line, and whether its machines are to blame and not its config."""
    # The local copy: the one in the trial's storage, which Ray itself reads, comes a failure later.
    file = trial.pickled_error_file
    # Without one it is an error of Ray Tune itself, which is kept as text only.
    error = pickle.loads(Path(file).read_bytes()) if file else trial.get_error()
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, RayActorError):
        return "the process of the trial died", True
    return lines[-1] if lines else type(cause).__name__, isinstance(cause, MachinesFailed)
