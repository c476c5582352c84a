"""The progress of a search, from its events: numbers for the live view, and the time left."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from tune_app.run.events import Event, TrialStarted
from tune_app.run.run_dir import Status
from tune_app.run.run_state import RunState, TrialState
from tune_app.run.search_config import SearchConfig


@dataclass(frozen=True)
class Rung:
    """All trials that were evaluated after `step` steps."""

    step: int
    trials: int
    best_loss: float  # of the finite ones; NaN if there are none
    median_loss: float


class Progress:
    """Adds up events. Not thread-safe: the live view reads it after each event and shows a copy.

    clock: monotonic seconds.
    """

    def __init__(self, config: SearchConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.run = RunState()
        self.confirmations = 0  # planned
        self._clock = clock
        self._began = clock()
        self._first_started: float | None = None  # when this command's first trial started
        self._confirming_since: float | None = None
        self._steps_before = 0  # done by earlier commands
        self._search_rate: float | None = None
        self._expected = 0  # runs of the confirmation's present step

    def replay(self, events: Iterable[Event]) -> None:
        """Takes in the events of earlier commands in the same run directory; their unfinished
        trials do not count as running until they are started again."""
        self.run = RunState.of(events)
        self.run.trials = {n: t for n, t in self.run.trials.items() if t.ended is not None}
        self._steps_before, self._first_started = self._steps_done(), None

    def expect(self, runs: int) -> None:
        """A step of the confirmation starts, with this many runs."""
        if self._confirming_since is None:
            self._search_rate = self._rate()
        self._confirming_since, self._expected = self._clock(), runs
        self.confirmations = runs + len(self.confirmed)

    def listen(self, event: Event) -> TrialState | None:
        """Takes an event in. Returns the trial that the event is about, if it is about one."""
        trial = self.run.apply(event)
        if isinstance(event, TrialStarted) and self._first_started is None:
            self._first_started = self._clock()
        return trial

    # ---------------------------------------------------------------------------- for the live view

    @property
    def searched(self) -> list[TrialState]:
        """The search's own trials that have started."""
        return [trial for trial in self.run.trials.values() if trial.of is None]

    @property
    def confirmed(self) -> list[TrialState]:
        """Confirmation runs that have ended."""
        return [t for t in self.run.trials.values() if t.of is not None and t.ended is not None]

    @property
    def running(self) -> list[TrialState]:
        return [trial for trial in self.run.trials.values() if trial.ended is None]

    @property
    def ended(self) -> int:
        """Trials of the search that have ended."""
        return sum(trial.ended is not None for trial in self.searched)

    @property
    def counts(self) -> dict[str, int]:
        """Trials of the search by status, without zeros."""
        found = Counter(trial.status for trial in self.searched)
        return {status.value: found[status] for status in Status if found[status]}

    @property
    def best(self) -> TrialState | None:
        """The finished trial with the lowest cost, whatever is optimised."""
        finished = [
            trial
            for trial in self.searched
            if trial.status == Status.FINISHED and math.isfinite(trial.loss)
        ]
        return min(finished, key=lambda trial: trial.cost, default=None)

    @property
    def rungs(self) -> list[Rung]:
        """The search's evaluations by step."""
        losses: dict[int, list[float]] = {}
        for trial in self.searched:
            for event in trial.reports:
                losses.setdefault(event.report.step, []).append(event.report.eval_loss)
        found = []
        for step in sorted(losses):
            finite = [loss for loss in losses[step] if math.isfinite(loss)] or [math.nan]
            found.append(Rung(step, len(losses[step]), min(finite), median(finite)))
        return found

    def elapsed_s(self) -> float:
        """Seconds since the command started."""
        return self._clock() - self._began

    def left_s(self) -> float | None:
        """Estimated seconds until the search's last trial, or the last confirmation run: remaining
        steps at the rate so far. None if there is nothing to estimate from.

        Allows for early stopping: future trials are assumed to be as long as those that have ended.
        """
        if self._confirming_since is not None:
            if not self._search_rate:
                return None
            # These report only at their end, so the search's own rate is used.
            all_s = self._expected * self.config.steps / self._search_rate
            left = all_s - (self._clock() - self._confirming_since)
            return max(left, 0.0) if self.confirmations > len(self.confirmed) else 0.0
        rate = self._rate()
        if not rate:
            return None
        ended = [trial.step for trial in self.searched if trial.ended is not None]
        typical = sum(ended) / len(ended) if ended else float(self.config.steps)
        to_start = max(0, self.config.trials - len(self.searched))
        steps = typical * to_start + sum(max(typical - trial.step, 0) for trial in self.running)
        left = steps / rate
        if self.config.time_budget is not None:
            left = min(left, max(self.config.time_budget - self.elapsed_s(), 0.0))
        return left

    def _rate(self) -> float | None:
        """Steps per second of all trials together since this command's first trial."""
        if self._first_started is None:
            return None
        seconds = self._clock() - self._first_started
        return (self._steps_done() - self._steps_before) / seconds if seconds > 0 else None

    def _steps_done(self) -> int:
        return sum(trial.step for trial in self.searched)
