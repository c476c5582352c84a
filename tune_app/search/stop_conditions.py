"""Why a search ends before all of its trials are done: a budget, a signal, or a failure."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tune_app.run.events import Event, TrialReported, TrialRetried
from tune_app.run.output import forget_output
from tune_app.run.run_state import RunState
from tune_app.run.search_config import SearchConfig

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class StopConditions:
    """Whether the search should end, and why; listens to the search's events.

    A budget only ends the search; its result is still confirmed. Everything else is `urgent`: it
    ends the confirmation too and has its own exit code.

    reason: None while the search is running
    exit_code: 0, or 1 after an infrastructure failure, or 128 + the signal's number
    """

    def __init__(self, config: SearchConfig) -> None:
        self.reason: str | None = None
        self.exit_code = 0
        self._time_budget, self._token_budget = config.time_budget, config.token_budget
        self._deadline: float | None = None
        self._run = RunState()
        self._failed: set[int] = set()  # trials that failed since any trial last made progress

    def __call__(self) -> bool:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._end("the time budget is spent")
        return self.reason is not None

    @property
    def urgent(self) -> bool:
        return self.exit_code != 0

    def begin(self, earlier: RunState) -> None:
        """The time budget starts now; the token budget includes the run's earlier events."""
        if self._time_budget is not None:
            self._deadline = time.monotonic() + self._time_budget
        self._run = earlier
        self._check_tokens()

    def listen(self, event: Event) -> None:
        if isinstance(event, TrialReported):
            known = self._run.trials.get(event.trial)
            if known is None or event.report.step > known.step:  # a retried trial repeats its last
                self._failed.clear()
            self._run.apply(event)
            self._check_tokens()
        elif isinstance(event, TrialRetried) and event.machines:
            # One failure may be bad luck. If a trial fails again before any other has made
            # progress, nothing can be trained any more.
            if event.trial in self._failed:
                self._end(event.reason, exit_code=1)
            self._failed.add(event.trial)

    def interrupt(self, signum: int) -> None:
        self._end("interrupted", exit_code=128 + signum)

    def _end(self, reason: str, exit_code: int = 0) -> None:
        if self.reason is None or (exit_code and not self.exit_code):
            self.reason, self.exit_code = reason, exit_code

    def _check_tokens(self) -> None:
        if self._token_budget is not None and self._run.tokens >= self._token_budget:
            self._end("the token budget is spent")


@contextmanager
def interruptible(stop: StopConditions, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP ends the search, which shows its results; a second Ctrl-C
    or SIGTERM raises KeyboardInterrupt. A signal that is ignored, as under nohup, stays ignored."""
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def on_signal(signum: int, frame: FrameType | None) -> None:
        hung_up = signum == signal.SIGHUP
        if hung_up:  # the terminal is gone, and writing to it would fail
            forget_output(*terminals)
        if stop.urgent:
            if hung_up:  # shells forward the signal that the terminal has sent as well
                return
            raise KeyboardInterrupt
        stop.interrupt(signum)
        name = _SIGNALS[signal.Signals(signum)]
        say(f"{name}: finishing up and showing results. Press Ctrl-C again to quit immediately.")

    before = {
        signum: signal.signal(signum, on_signal)
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
