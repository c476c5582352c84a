"""What happens in a run: a frozen record for each kind of event.

A run's events.jsonl has one JSON object per line, `{"time": ..., "event": KIND, ...}`. Events are
written by appending such a record; `run_state.py` folds them into the state of a run. Reading is
tolerant, so that runs of other versions open too: unknown kinds and keys are ignored, and missing
keys get the record's defaults.

Imports neither torch nor ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import Status
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
