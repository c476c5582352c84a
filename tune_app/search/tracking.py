"""Logs trials to MLflow and Weights & Biases, which listen to the events of a search.

They get each trial's hyperparameters, and its reports by training step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tune_app.run.events import Event, TrialEnded, TrialReported, TrialStarted
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import Report
from tune_app.search.trial_job import trial_name

_LAST_WORDS_S = 60.0  # how long to wait at the end for a tracker to take the remaining events


class Tracker(Protocol):
    """A tracking program, with one run for each trial."""

    name: str

    def started(self, trial: int, parameters: dict[str, Any]) -> None: ...

    def reported(self, trial: int, report: Report) -> None: ...

    def ended(self, trial: int, status: Status) -> None: ...


class MLflow:
    """Runs in an experiment with the name of the search's folder."""

    name = "MLflow"

    def __init__(self, uri: str, experiment: str) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(experiment)
        self._experiment = (
            self._client.create_experiment(experiment) if known is None else known.experiment_id
        )
        self._runs: dict[int, str] = {}

    def started(self, trial: int, parameters: dict[str, Any]) -> None:
        from mlflow.entities import Param

        run = self._client.create_run(self._experiment, run_name=trial_name(trial))
        self._runs[trial] = run.info.run_id
        params = [Param(name, str(value)) for name, value in parameters.items()]
        self._client.log_batch(run.info.run_id, params=params)

    def reported(self, trial: int, report: Report) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, float(value), now, report.step) for name, value in report.flat().items()
        ]
        self._client.log_batch(self._runs[trial], metrics=metrics)

    def ended(self, trial: int, status: Status) -> None:
        words = {Status.FAILED: "FAILED", Status.INTERRUPTED: "KILLED"}
        self._client.set_terminated(self._runs[trial], words.get(status, "FINISHED"))


class Wandb:
    """Runs in a project, grouped by the name of the search's folder, which also has W&B's files."""

    name = "Weights & Biases"

    def __init__(self, project: str, run: RunDir) -> None:
        self._project, self._run = project, run
        self._runs: dict[int, Any] = {}

    def started(self, trial: int, parameters: dict[str, Any]) -> None:
        import wandb

        self._runs[trial] = wandb.init(
            project=self._project,
            group=self._run.path.name,
            name=trial_name(trial),
            config=parameters,
            dir=str(self._run.path),
            reinit="create_new",  # along with the runs of other trials
            settings=wandb.Settings(silent=True, console="off"),
        )

    def reported(self, trial: int, report: Report) -> None:
        self._runs[trial].log(report.flat(), step=report.step)

    def ended(self, trial: int, status: Status) -> None:
        self._runs.pop(trial).finish(exit_code=int(status in (Status.FAILED, Status.INTERRUPTED)))


class _Follower:
    """Passes events to a tracker in a separate thread, so that no trial waits for a server.

    If the tracker fails, that is reported once with `say`, and the search continues without it.
    """

    def __init__(self, name: str, opened: Callable[[], Tracker], say: Callable[[str], None]):
        self._name, self._opened, self._say = name, opened, say
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)
        self._thread.start()

    def listen(self, event: Event) -> None:
        self._events.put(event)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(_LAST_WORDS_S)

    def _follow(self) -> None:
        tracker, running = None, set[int]()
        try:
            while (event := self._events.get()) is not None:
                tracker = tracker or self._opened()
                self._tell(tracker, event, running)
            for trial in running:
                assert tracker is not None
                tracker.ended(trial, Status.INTERRUPTED)
        except Exception as error:  # clients of servers: whatever they and their transport raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(f"{self._name} failed; the search continues without it: {reason}")

    @staticmethod
    def _tell(tracker: Tracker, event: Event, running: set[int]) -> None:
        if isinstance(event, TrialStarted):
            running.add(event.trial)
            tracker.started(event.trial, _parameters(event))
        elif isinstance(event, TrialReported) and event.trial in running:
            tracker.reported(event.trial, event.report)
        elif isinstance(event, TrialEnded) and event.trial in running:
            running.discard(event.trial)
            tracker.ended(event.trial, event.status)


def _parameters(event: TrialStarted) -> dict[str, Any]:
    """The trial's number and origin, and its hyperparameters, except those that are not set."""
    about = {"trial": event.trial, "origin": event.origin, "of": event.of}
    parameters = about | event.config.to_dict()
    return {name: value for name, value in parameters.items() if value is not None}


@contextmanager
def trackers(
    config: SearchConfig, run: RunDir, say: Callable[[str], None]
) -> Iterator[list[Callable[[Event], None]]]:
    """Listeners for --mlflow and --wandb; at the end, waits until they have taken all events."""
    uri, project = config.mlflow, config.wandb
    followers = []
    if uri is not None:
        name = run.path.name
        followers.append(_Follower(MLflow.name, lambda: MLflow(uri, name), say))
    if project is not None:
        followers.append(_Follower(Wandb.name, lambda: Wandb(project, run), say))
    try:
        yield [follower.listen for follower in followers]
    finally:
        for follower in followers:
            follower.close()
