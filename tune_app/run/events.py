"""What happens in a run: a frozen record for each kind of event, and one fold over all of them.

A run's events.jsonl has one JSON object per line, `{"time": ..., "event": KIND, ...}`. Events are
written by appending such a record, and the state of a run is read with `RunState`. Reading is
tolerant, so that runs of other versions open too: unknown kinds and keys are ignored, and missing
keys get the record's defaults.

Imports neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report
from tune_app.run.typed import fits, well_typed


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that has happened, at `time` (unix seconds)."""

    kind: ClassVar[str]
    time: float = field(default_factory=time.time, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The event as a line of events.jsonl holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "time"}
        return {"time": self.time, "event": self.kind} | self._written(values)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        """The event of a line; values that have not their field's type count as missing.

        Raises KeyError, TypeError, ValueError or AttributeError if it lacks what its kind needs."""
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in line.items() if k in known and v is not None}
        return cls(**well_typed(cls, cls._read(given, line)))

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields' values as they are written to JSON."""
        return values

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        """The fields' values, given those that the line contains."""
        return given


@dataclass(frozen=True, kw_only=True)
class SearchStarted(Event):
    """A command starts to search, or to train the only trial of its run.

    trials: how many are requested, without confirmation runs
    metric: the task's, such as "accuracy": its name in reports
    sampled: the hyperparameters that the search varies
    fingerprint: of the data
    classes: the labels of a classification, in the order of the classes
    data: a `DataSummary` (`tasks/summary.py`) as JSON
    study: name of the Optuna study
    """

    kind = "search_started"
    trials: int = 0
    task: str = ""
    metric: str = ""
    sampled: tuple[str, ...] = ()
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    data: Mapping[str, Any] | None = None
    study: str = ""

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        return given | {k: tuple(given[k]) for k in ("sampled", "classes") if k in given}


@dataclass(frozen=True, kw_only=True)
class SearchResumed(SearchStarted):
    """Another command continues the run."""

    kind = "search_resumed"


@dataclass(frozen=True, kw_only=True)
class WarmStarted(Event):
    """What a search has taken over from earlier runs: of each, how many trials were ranked; the
    configs that run first, after the baselines; priors as `study.prior.to_json` writes them."""

    kind = "warm_started"
    trials: Mapping[str, int] = field(default_factory=dict)
    first: tuple[TrialConfig, ...] = ()
    priors: Mapping[str, Any] = field(default_factory=dict)

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"first": [config.to_dict() for config in self.first]}

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        return given | {"first": tuple(map(TrialConfig.from_known, given.get("first", ())))}


@dataclass(frozen=True, kw_only=True)
class SearchEnded(Event):
    """The search, or the confirmation after it, is over; `hosts` has each host's counters."""

    kind = "search_ended"
    reason: str = ""
    hosts: tuple[HostCounters, ...] = ()

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"hosts": [host.to_json() for host in self.hosts]}

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        hosts = [host for host in given.get("hosts", ()) if isinstance(host, Mapping)]
        return given | {"hosts": tuple(map(HostCounters.from_json, hosts))}


@dataclass(frozen=True, kw_only=True)
class TrialEvent(Event):
    """Something that has happened to one trial."""

    trial: int


@dataclass(frozen=True, kw_only=True)
class TrialStarted(TrialEvent):
    """A trial starts, or starts again in another command.

    of: the trial that a confirmation run repeats
    look: for a confirmation run: 0 if it helps to choose, otherwise the number of the look that it
        is for; None in runs made before there were looks
    """

    kind = "trial_started"
    origin: str = "suggested"
    config: TrialConfig = field(default_factory=TrialConfig)
    of: int | None = None
    look: int | None = None

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        more = {"of": self.of, "look": self.look}
        more = {name: value for name, value in more.items() if value is not None}
        return {"trial": self.trial, "origin": self.origin, "config": self.config.to_dict()} | more

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        return given | {"config": TrialConfig.from_known(given.get("config", {}))}


@dataclass(frozen=True, kw_only=True)
class TrialReported(TrialEvent):
    """A trial has been evaluated."""

    kind = "report"
    report: Report

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"trial": self.trial, **self.report.flat()}

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        reported = {k: v for k, v in line.items() if k not in ("time", "event", "trial")}
        return given | {"report": Report.from_flat(reported)}


@dataclass(frozen=True, kw_only=True)
class TrialRetried(TrialEvent):
    """A trial has failed and starts again from its last checkpoint.

    machines: it was an infrastructure failure (of its host or the swarm), not a bad config
    """

    kind = "trial_retried"
    reason: str = ""
    machines: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialEnded(TrialEvent):
    """A trial has ended, and how."""

    kind = "trial_ended"
    status: Status = Status.FAILED
    reason: str = ""

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        status = given.get("status")
        return given | {"status": Status(status) if status in list(Status) else Status.FAILED}


@dataclass(frozen=True)
class Clone:
    """A trial that continues as a clone of trial `of`, with that trial's config changed once
    more."""

    trial: int
    of: int
    config: TrialConfig


@dataclass(frozen=True, kw_only=True)
class PopulationChanged(Event):
    """A round of a population, after `step` steps."""

    kind = "population_changed"
    step: int
    changed: tuple[Clone, ...] = ()

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        changed = [
            {"trial": clone.trial, "of": clone.of, "config": clone.config.to_dict()}
            for clone in self.changed
        ]
        return {"step": self.step, "changed": changed}

    @classmethod
    def _read(cls, given: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
        changed = [
            Clone(clone["trial"], clone["of"], TrialConfig.from_known(clone["config"]))
            for clone in given.get("changed", ())
        ]
        return given | {"changed": tuple(changed)}


@dataclass(frozen=True, kw_only=True)
class OtherEvent(Event):
    """An event that this version does not know or cannot read; only its time counts."""

    kind = "other"


_KINDS: dict[str, type[Event]] = {
    kind.kind: kind
    for kind in (
        SearchStarted,
        SearchResumed,
        WarmStarted,
        SearchEnded,
        TrialStarted,
        TrialReported,
        TrialRetried,
        TrialEnded,
        PopulationChanged,
    )
}


def event_from_json(line: Mapping[str, Any]) -> Event:
    """The event of a line."""
    if not fits(line.get("time"), float) or not math.isfinite(line["time"]):
        line = {**line, "time": math.nan}
    kind = _KINDS.get(line["event"], OtherEvent)
    try:
        return kind.from_json(line)
    except (KeyError, TypeError, ValueError, AttributeError):
        return OtherEvent(time=line["time"])


# ------------------------------------------------------------------------------ the state of a run


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
    return dataclasses.replace(event, **missing)
