"""What happens in a search, written into the run directory while it happens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial

from tune_app.run.run_dir import RunDir, Status
from tune_app.run.trial_report import kept, outcome
from tune_app.search.ray_tune.trainable import MachinesFailed
from tune_app.search.ray_tune.trial_job import job_of


class Recorder(tune.Callback):
    """Appends each event to events.jsonl and hands it to `listen`.

    stopping: whether the search is ending; a trial that this cuts off has no end of its own.
    """

    def __init__(
        self, run: RunDir, listen: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> None:
        self._run, self._listen, self._stopping = run, listen, stopping
        self._started: set[str] = set()  # Ray's ids of trials

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes; listeners hold locks

    def record(self, event: str, **values: Any) -> None:
        entry = {"event": event, **values}
        self._run.append_event(entry)
        self._listen(entry)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        job = job_of(trial.config)
        start = {"trial": job.number, "origin": job.origin, "config": job.config.to_dict()}
        if job.of is not None:
            start["of"] = job.of
        if trial.trial_id not in self._started:  # else it goes on after a failure
            self._started.add(trial.trial_id)
            self.record("trial_started", **start)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        self.record("report", trial=job_of(trial.config).number, **kept(result))

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        reason, machines = _reason(trial)
        number = job_of(trial.config).number
        self.record("trial_retried", trial=number, reason=reason, machines=machines)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        status, reason = outcome(trial.last_result or {}, job_of(trial.config).config.steps)
        if status != Status.STOPPED or not self._stopping():
            self._end(trial, status, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(trial, Status.FAILED, _reason(trial)[0])

    def _end(self, trial: Trial, status: Status, reason: str) -> None:
        number = job_of(trial.config).number
        self.record("trial_ended", trial=number, status=str(status), reason=reason)


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
