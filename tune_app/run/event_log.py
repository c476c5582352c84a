"""A run's events.jsonl: appended to by the running command, read whole."""

from __future__ import annotations

from collections.abc import Callable

from tune_app.run.events import Event, event_from_json
from tune_app.run.run_dir import RunDir


def append(run: RunDir, event: Event) -> None:
    run.append_event(event.to_json())


def read(run: RunDir) -> list[Event]:
    """All events of a run in the order written."""
    return [event_from_json(line) for line in run.events()]


class EventLog:
    """Where a running command writes its events: to the run's file, and to its listeners."""

    def __init__(self, run: RunDir, *listeners: Callable[[Event], None]) -> None:
        self._run, self._listeners = run, listeners

    def record(self, event: Event) -> None:
        append(self._run, event)
        for listen in self._listeners:
            listen(event)
