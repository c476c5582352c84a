"""The command `python -m tune_app.search`: check everything, search, show what was found."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tune_app.checks import check_everything, check_same_data
from tune_app.config import ConfigError, SearchConfig
from tune_app.dry_run import dry_run
from tune_app.flags import parse_search_args
from tune_app.live import LiveView
from tune_app.optuna_space import SearchSpace
from tune_app.report import kept_fresh, write_all
from tune_app.run_dir import RunDir


class Ending:
    """Why the search should end, once something says so: a budget, or Ctrl-C."""

    def __init__(self, config: SearchConfig) -> None:
        self.reason: str | None = None
        self._tokens_left = config.token_budget
        self._deadline = None
        if config.time_budget is not None:
            self._deadline = time.monotonic() + config.time_budget
        self._tokens: dict[int, int] = {}

    def __call__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "the time budget is spent"
        return self.reason is not None

    def listen(self, event: dict[str, Any]) -> None:
        """Adds up the tokens that trials report."""
        if event["event"] == "report" and self._tokens_left is not None:
            self._tokens[event["trial"]] = event["tokens"]
            if self.reason is None and sum(self._tokens.values()) >= self._tokens_left:
                self.reason = "the token budget is spent"


@contextmanager
def interruptible(ending: Ending, live: LiveView) -> Iterator[None]:
    """The first Ctrl-C ends the search and shows its results; the second one ends the command."""

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if ending.reason is not None:
            raise KeyboardInterrupt
        ending.reason = "interrupted"
        live.say("Ctrl-C: ending the search; once more to leave at once")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when the search has shown results, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        config = parse_search_args(argv)
        space = check_everything(config)
        if config.dry_run:
            print(dry_run(config, space))
            return 0
        run = RunDir(config.out or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S"))
        with run.lock():
            return run_search(replace(config, out=run.path), space, run)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("left at once; go on with --resume", file=sys.stderr)
        return 130


def run_search(config: SearchConfig, space: SearchSpace, run: RunDir) -> int:
    """Runs or resumes the search in `run`, confirms its best, and shows what it found."""
    # Imported here: they need a second, which a user's mistake should not have to wait for.
    from tune_app.cluster import cluster
    from tune_app.tuning import confirm, search

    live, ending = LiveView(config, run), Ending(config)
    with interruptible(ending, live), live, cluster(config, progress=live.progress) as machines:
        check_same_data(config, run, machines.about["fingerprint"])
        run.write_atomic(run.search_yaml, config.to_yaml())
        run.write_atomic(run.space_yaml, space.text)
        live.introduce(machines)
        with kept_fresh(run):
            search(config, space, run, machines, live, ending)
            confirm(config, run, machines, live, ending)
    print(write_all(run, width=_terminal_width()), end="")
    return 130 if ending.reason == "interrupted" else 0


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100


if __name__ == "__main__":
    sys.exit(main())
