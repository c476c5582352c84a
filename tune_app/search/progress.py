"""Where a search stands, from its events: what the live view shows, and how long it may take."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tune_app.run.run_dir import Status
from tune_app.run.search_config import SearchConfig
from tune_app.search.ray_tune.trial_job import seed_index_of

Event = dict[str, Any]


@dataclass(frozen=True)
class Rung:
    """All trials that were evaluated after `step` steps."""

    step: int
    trials: int
    best_loss: float  # of the finite ones; NaN where there is none
    median_loss: float


@dataclass
class Run:
    """A trial of the search, or a confirmation run, as far as it has come."""

    trial: int
    config: dict[str, Any]
    of: int | None = None  # the trial that it confirms
    seed_index: int = 0  # the how manyth fresh seed, from 1
    last: Event = field(default_factory=dict)  # its last report
    losses: dict[int, float] = field(default_factory=dict)  # by step; NaN where there is none
    status: str = Status.RUNNING
    reason: str = ""

    @property
    def loss(self) -> float:
        """The last reported eval_loss, NaN without one."""
        return _finite(self.last.get("eval_loss"))

    @property
    def step(self) -> int:
        return int(self.last.get("step", 0))


class Progress:
    """Adds up events. Not thread-safe: the live view asks it after each event and shows a copy.

    clock: monotonic seconds.
    """

    def __init__(self, config: SearchConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.metric, self.sampled = "", list[str]()
        self.confirmations = 0  # planned
        self.runs: dict[int, Run] = {}
        self._clock = clock
        self._began = clock()
        self._first_started: float | None = None  # of the runs that this command works on
        self._confirming_since: float | None = None
        self._steps_before = 0  # done by earlier commands
        self._search_rate: float | None = None

    def replay(self, events: Iterable[Event]) -> None:
        """What earlier commands have done in the same run directory; what they left is not going
        on until it is started again."""
        for event in events:
            self.listen(event)
        self.runs = {n: run for n, run in self.runs.items() if run.status != Status.RUNNING}
        self._steps_before, self._first_started = self._steps_done(), None

    def expect(self, runs: int) -> None:
        """The confirmation begins, with so many runs still to come."""
        self._search_rate = self._rate()
        self._confirming_since = self._clock()
        self.confirmations = runs + len(self.confirmed)

    def listen(self, event: Event) -> Run | None:
        """Takes an event in; the run that it is about, where it is about one."""
        kind = event["event"]
        if kind in ("search_started", "search_resumed"):
            self.metric = event.get("metric", "")
            self.sampled = list(event.get("sampled", ()))
        for change in event.get("changed", ()):  # of a population
            if change["trial"] in self.runs:
                self.runs[change["trial"]].config = change["config"]
        if "trial" not in event:
            return None
        trial = int(event["trial"])
        if kind == "trial_started":
            self._start(trial, event)
        run = self.runs.get(trial)
        if run is None:
            return None
        if kind == "report":
            run.last = event
            run.losses[int(event["step"])] = run.loss
        elif kind == "trial_ended":
            run.status, run.reason = str(event["status"]), str(event.get("reason") or "")
        return run

    def _start(self, trial: int, event: Event) -> None:
        of = event.get("of")
        index = seed_index_of(trial) if of is not None else 0
        self.runs[trial] = Run(trial, event.get("config") or {}, of, index)
        if self._first_started is None:
            self._first_started = self._clock()

    # -------------------------------------------------------------------------- what is to be seen

    @property
    def searched(self) -> list[Run]:
        """The search's own trials that have started."""
        return [run for run in self.runs.values() if run.of is None]

    @property
    def confirmed(self) -> list[Run]:
        """Confirmation runs that have ended."""
        return [r for r in self.runs.values() if r.of is not None and r.status != Status.RUNNING]

    @property
    def running(self) -> list[Run]:
        return [run for run in self.runs.values() if run.status == Status.RUNNING]

    @property
    def ended(self) -> int:
        """Trials of the search that have ended."""
        return sum(run.status != Status.RUNNING for run in self.searched)

    @property
    def counts(self) -> dict[str, int]:
        """Trials of the search by status; only what there is."""
        found = Counter(run.status for run in self.searched)
        return {status.value: found[status] for status in Status if found[status]}

    @property
    def best(self) -> Run | None:
        """The finished trial with the lowest loss."""
        finished = [
            run
            for run in self.searched
            if run.status == Status.FINISHED and math.isfinite(run.loss)
        ]
        return min(finished, key=lambda run: run.loss, default=None)

    @property
    def rungs(self) -> list[Rung]:
        """The search's evaluations by step."""
        losses: dict[int, list[float]] = {}
        for run in self.searched:
            for step, loss in run.losses.items():
                losses.setdefault(step, []).append(loss)
        found = []
        for step in sorted(losses):
            finite = [loss for loss in losses[step] if math.isfinite(loss)] or [math.nan]
            found.append(Rung(step, len(losses[step]), min(finite), median(finite)))
        return found

    def elapsed_s(self) -> float:
        """Since the command began."""
        return self._clock() - self._began

    def left_s(self) -> float | None:
        """Seconds until the search's last trial, or the last confirmation run, as far as can be
        said: steps still to do, at the rate of those done. None where there is nothing to go by.

        Trials that are stopped early are allowed for: future ones are taken to be as long as those
        that have ended.
        """
        if self._confirming_since is not None:
            if not self._search_rate:
                return None
            # These report only at their end, so the search's own pace has to do.
            all_s = self.confirmations * self.config.steps / self._search_rate
            left = all_s - (self._clock() - self._confirming_since)
            return max(left, 0.0) if self.confirmations > len(self.confirmed) else 0.0
        rate = self._rate()
        if not rate:
            return None
        ended = [run.step for run in self.searched if run.status != Status.RUNNING]
        typical = sum(ended) / len(ended) if ended else float(self.config.steps)
        to_start = max(0, self.config.trials - len(self.searched))
        steps = typical * to_start + sum(max(typical - run.step, 0) for run in self.running)
        left = steps / rate
        if self.config.time_budget is not None:
            left = min(left, max(self.config.time_budget - self.elapsed_s(), 0.0))
        return left

    def _rate(self) -> float | None:
        """Steps per second, of all trials together, since this command's first trial."""
        if self._first_started is None:
            return None
        seconds = self._clock() - self._first_started
        return (self._steps_done() - self._steps_before) / seconds if seconds > 0 else None

    def _steps_done(self) -> int:
        return sum(run.step for run in self.searched)


def _finite(value: Any) -> float:
    """The number, NaN where it is missing or none (JSON has no NaN, so it comes as None)."""
    return float(value) if isinstance(value, int | float) else math.nan
