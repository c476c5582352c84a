"""One quiet line while a search runs; in a pipe, one plain line for each finished trial."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from tune_app.config import SearchConfig
from tune_app.results.words import duration, number
from tune_app.run_dir import RunDir

if TYPE_CHECKING:
    from tune_app.cluster import Cluster


class LiveView:
    """Listens to the search's events and keeps the person at the terminal informed."""

    def __init__(self, config: SearchConfig, run: RunDir, stream: TextIO | None = None) -> None:
        self._run, self._planned, self._quiet = run, config.trials, config.quiet
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._began, self._running, self._ended = time.monotonic(), set[int](), 0
        self._losses: dict[int, float] = {}
        self._best: tuple[float, int] | None = None

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *_: object) -> None:
        self._erase()

    def introduce(self, machines: Cluster) -> None:
        """What is known before the first trial: where the results go, where to watch."""
        self.say(f"run directory: {self._run.path}")
        for note in machines.about["notes"]:
            self.say(f"note: {note}")
        if machines.dashboard:
            self.say(
                f"Ray dashboard: {machines.dashboard} (it asks for the token that "
                "`ray get-auth-token` prints)"
            )

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if not self._quiet:
            self._erase()
            print(text, file=self._stream, flush=True)

    def progress(self, text: str) -> None:
        """What is being waited for before the first trial."""
        if self._is_terminal and not self._quiet:
            self._erase()
            print(f"{text} ...", end="", file=self._stream, flush=True)
        else:
            self.say(text)

    def expect(self, runs: int) -> None:
        """So many more runs come."""
        self._planned += runs

    def listen(self, event: dict[str, Any]) -> None:
        kind, trial = event["event"], int(event.get("trial", -1))
        if kind == "trial_started":
            self._running.add(trial)
        elif kind == "report":
            self._losses[trial] = event["eval_loss"]
        elif kind == "trial_ended":
            self._running.discard(trial)
            self._ended += 1
            loss = self._losses.get(trial, float("nan"))
            if event["status"] == "finished" and (self._best is None or loss < self._best[0]):
                self._best = (loss, trial)
            if not self._is_terminal:
                reason = f" ({event['reason']})" if event["reason"] else ""
                self.say(f"trial {trial}: {event['status']}, loss {number(loss)}{reason}")
        self._draw()

    def _draw(self) -> None:
        if self._quiet or not self._is_terminal:
            return
        self._erase()
        best = (
            "none yet" if self._best is None else f"{number(self._best[0])} (trial {self._best[1]})"
        )
        print(
            f"trials: {self._ended} of {self._planned} done, {len(self._running)} running; "
            f"best loss {best}; {duration(time.monotonic() - self._began)}",
            end="",
            file=self._stream,
            flush=True,
        )

    def _erase(self) -> None:
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=self._stream)
