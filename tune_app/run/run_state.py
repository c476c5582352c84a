"""The state of a run and of its trials: the one fold over all events, which every reader uses.

Imports neither torch nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from tune_app.run.events import (
    Event,
    PopulationChanged,
    SearchEnded,
    SearchStarted,
    TrialEnded,
    TrialEvent,
    TrialReported,
    TrialStarted,
    WarmStarted,
    event_from_json,
)
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report


@dataclass
class TrialState:
    """The state of a trial according to its events.

    reports: in the order of their steps. A trial that was resumed from a checkpoint reports some
        steps again: the reports after the resume win.
    """

    number: int
    started: TrialStarted | None = None  # the latest one
    config: TrialConfig | None = None  # with a population's changes
    reports: list[TrialReported] = field(default_factory=list)
    ended: TrialEnded | None = None  # None again once it has been restarted

    @property
    def of(self) -> int | None:
        return None if self.started is None else self.started.of

    @property
    def look(self) -> int | None:
        return None if self.started is None else self.started.look

    @property
    def origin(self) -> str:
        return "suggested" if self.started is None else self.started.origin

    @property
    def last(self) -> Report | None:
        return self.reports[-1].report if self.reports else None

    @property
    def loss(self) -> float:
        """The last reported eval_loss, NaN without one."""
        return math.nan if self.last is None else self.last.eval_loss

    @property
    def cost(self) -> float:
        """What the search minimises; the loss in runs that did not record an objective."""
        if self.last is None or math.isnan(self.last.objective):
            return self.loss
        return self.last.objective

    @property
    def step(self) -> int:
        """The step of the last report; 0 before the first one."""
        return 0 if self.last is None else self.last.step

    @property
    def status(self) -> Status:
        """How it ended; RUNNING if it has not, even if no process is working on it."""
        return Status.RUNNING if self.ended is None else self.ended.status

    @property
    def reason(self) -> str:
        """Why it ended that way, in words; "" if that is obvious."""
        return "" if self.ended is None else self.ended.reason


@dataclass
class RunState:
    """The state of a run after the events applied so far."""

    first: SearchStarted | None = None  # the command that made the run
    search: SearchStarted | None = None  # the latest command; what it left out stays as before
    ended: SearchEnded | None = None  # None while the latest command is running, or if it died
    warm: WarmStarted | None = None  # what the search took over from earlier runs
    trials: dict[int, TrialState] = field(default_factory=dict)
    rounds: list[PopulationChanged] = field(default_factory=list)
    seconds: float = 0.0  # wall time, without the pauses between commands
    _began: float | None = None  # when the latest command started
    _before: float = 0.0  # seconds of all commands before it

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunState:
        state = cls()
        for event in events:
            state.apply(event)
        return state

    @classmethod
    def read(cls, run: RunDir) -> RunState:
        return cls.of(event_from_json(line) for line in run.events())

    @property
    def tokens(self) -> int:
        """Tokens that all trials together have trained on."""
        return sum(trial.last.tokens for trial in self.trials.values() if trial.last is not None)

    def apply(self, event: Event) -> TrialState | None:
        """Updates the state. Returns the trial that the event is about, if it is about one."""
        self._count_time(event)
        if isinstance(event, SearchStarted):
            self.first = self.first or event
            self.search = event if self.search is None else _over(event, self.search)
            self.ended = None
        elif isinstance(event, WarmStarted):
            self.warm = event
        elif isinstance(event, SearchEnded):
            self.ended = event
        elif isinstance(event, PopulationChanged):
            self.rounds.append(event)
            for clone in event.changed:
                if clone.trial in self.trials:
                    self.trials[clone.trial].config = clone.config
        elif isinstance(event, TrialEvent):
            return self._apply_to_trial(event)
        return None

    def _apply_to_trial(self, event: TrialEvent) -> TrialState:
        trial = self.trials.setdefault(event.trial, TrialState(event.trial))
        if isinstance(event, TrialStarted):
            trial.started, trial.config, trial.ended = event, event.config, None
        elif isinstance(event, TrialReported):
            step = event.report.step
            trial.reports = [old for old in trial.reports if old.report.step < step] + [event]
        elif isinstance(event, TrialEnded):
            trial.ended = event
        return trial

    def _count_time(self, event: Event) -> None:
        if math.isnan(event.time):
            return
        if self._began is None or isinstance(event, SearchStarted):
            self._began, self._before = event.time, self.seconds
        self.seconds = self._before + event.time - self._began


def _over(event: SearchStarted, before: SearchStarted) -> SearchStarted:
    """The event, with the fields that it leaves empty taken from the one before."""
    missing = {f.name: getattr(before, f.name) for f in fields(event) if not getattr(event, f.name)}
    return replace(event, **missing)
