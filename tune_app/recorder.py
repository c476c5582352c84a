"""What happens in a search, written into the run directory while it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from tune_app.run_dir import RunDir, Status
from tune_app.trial_job import number_of

# What a trainable's result holds for us; Ray adds its own keys beside them.
_REPORTED = (
    "step",
    "train_loss",
    "eval_loss",
    "objective",
    "learning_rate",
    "tokens",
    "seconds",
    "diverged",
    "accuracy",
    "perplexity",
    "test_loss",
    "test_accuracy",
    "test_perplexity",
)


class Recorder(tune.Callback):
    """Appends each event to events.jsonl and hands it to `listen`.

    stopping: whether the search is ending; a trial that this cuts off has no end of its own.
    """

    def __init__(
        self, run: RunDir, listen: Callable[[dict[str, Any]], None], stopping: Callable[[], bool]
    ) -> None:
        self._run, self._listen, self._stopping = run, listen, stopping
        self._started: set[str] = set()

    def record(self, event: str, **values: Any) -> None:
        entry = {"event": event, **values}
        self._run.append_event(entry)
        self._listen(entry)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id in self._started:
            return  # Ray starts it again after a failure: the same trial goes on
        self._started.add(trial.trial_id)
        job = trial.config["job"]
        of = {"of": job["of"]} if "of" in job else {}
        self.record(
            "trial_started",
            trial=number_of(str(trial)),
            origin=job["origin"],
            config=job["trial"],
            **of,
        )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        values = {name: result[name] for name in _REPORTED if name in result}
        self.record("report", trial=number_of(str(trial)), **values)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self.record("trial_retried", trial=number_of(str(trial)), reason=_reason(trial))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        last, steps = trial.last_result or {}, trial.config["job"]["trial"]["steps"]
        if last.get("diverged"):
            self._end(trial, Status.DIVERGED, "the loss exploded or was not finite")
        elif last.get("step", 0) >= steps:
            self._end(trial, Status.FINISHED, "")
        elif not self._stopping():
            self._end(trial, Status.STOPPED, f"behind the others at step {last.get('step', 0)}")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._end(trial, Status.FAILED, _reason(trial))

    def _end(self, trial: Trial, status: Status, reason: str) -> None:
        number = number_of(str(trial))
        self.record("trial_ended", trial=number, status=str(status), reason=reason)


def _reason(trial: Trial) -> str:
    """The last line of a trial's error that says something."""
    try:
        lines = [line.strip() for line in str(trial.get_error()).splitlines() if line.strip()]
    except Exception:  # Ray keeps the error in a file that may be gone
        lines = []
    return lines[-1] if lines else "unknown"
