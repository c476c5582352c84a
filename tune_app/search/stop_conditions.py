"""Why a search ends before all of its trials are done: a budget, a signal, or dead machines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tune_app.run.events import Event, RunState, TrialReported, TrialRetried
from tune_app.run.output import forget_output
from tune_app.run.search_config import SearchConfig

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Ending:
    """Whether the search is to end, and why; listens to the search's events.

    A budget ends the search only: what it found is still confirmed. Everything else, `urgent`, ends
    the confirmation too and has an exit code of its own.

    reason: None while the search goes on
    exit_code: 0, or 1 where the machines are gone, or 128 + the signal's number
    """

    def __init__(self, config: SearchConfig) -> None:
        self.reason: str | None = None
        self.exit_code = 0
        self._time_budget, self._token_budget = config.time_budget, config.token_budget
        self._deadline: float | None = None
        self._run = RunState()
        self._failed: set[int] = set()  # trials that failed since one of them got on

    def __call__(self) -> bool:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._end("the time budget is spent")
        return self.reason is not None

    @property
    def urgent(self) -> bool:
        return self.exit_code != 0

    def begin(self, earlier: RunState) -> None:
        """The time budget runs from now; the token budget counts the run's earlier events too."""
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
            # Once may be bad luck, which other trials survive. A trial that fails again while no
            # other one gets on either has nothing to train on.
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
def interruptible(ending: Ending, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP ends the search, which shows its results; a second Ctrl-C
    or SIGTERM raises KeyboardInterrupt. A signal that is ignored, as under nohup, stays ignored."""
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def on_signal(signum: int, frame: FrameType | None) -> None:
        hung_up = signum == signal.SIGHUP
        if hung_up:  # nothing can be written to a terminal that is gone
            forget_output(*terminals)
        if ending.urgent:
            if hung_up:  # a shell passes on the one that the terminal has sent as well
                return
            raise KeyboardInterrupt
        ending.interrupt(signum)
        name = _SIGNALS[signal.Signals(signum)]
        say(f"{name}: finishing up and showing results; once more quits immediately")

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
