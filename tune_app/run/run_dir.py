"""Every path of a run, and the only two ways to write its files: append a line, or replace it all.

A run looks like this:

    RUN/search.yaml space.yaml   what was asked for
    RUN/events.jsonl             what happened, one JSON object per line: the source of truth
    RUN/study.db                 the Optuna study
    RUN/trials/<n>/checkpoint    what trial n trains, as of its last evaluation
    RUN/prompts/                 the best trial's prompts, exported
    RUN/ray/                     Ray Tune's own folder
    RUN/trials.csv …             made from the events by `tune_app.report`
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import Enum, StrEnum
from itertools import chain, count
from pathlib import Path
from typing import Any

from tune_app.run.passwords import without_passwords
from tune_app.run.paths import user_path
from tune_app.run.search_config import ConfigError


class Status(StrEnum):
    """The state of a trial. The first four are in `trial_ended` events, the others are inferred."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by the trial scheduler, before its last step
    DIVERGED = "diverged"
    FAILED = "failed"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # started, never ended, and no process is working on it any more


def new_run(prefix: str = "") -> RunDir:
    """A run in a new folder below runs/, named by the time; made at once, so that a command that
    begins in the same second gets another."""
    folder = Path("runs") / (prefix + datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    for name in chain([folder.name], (f"{folder.name}-{n}" for n in count(2))):
        try:
            folder.with_name(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # `RunDir.lock` says so
        break
    return RunDir(folder.with_name(name))


_locked_here: set[Path] = set()  # runs whose lock this process holds


class RunDir:
    """The paths of one run below `path`, which is made absolute (Ray requires that)."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path).resolve()
        self.search_yaml = self.path / "search.yaml"
        self.space_yaml = self.path / "space.yaml"
        self.events_jsonl = self.path / "events.jsonl"
        self.study_db = self.path / "study.db"
        self.trials_csv = self.path / "trials.csv"
        self.history_csv = self.path / "history.csv"
        self.importance_csv = self.path / "importance.csv"
        self.best_yaml = self.path / "best.yaml"
        self.summary_txt = self.path / "summary.txt"
        self.report_html = self.path / "report.html"
        self.prompts = self.path / "prompts"
        self.prompts_json = self.prompts / "prompts.json"
        self.ray = self.path / "ray"
        self.lock_file = self.path / "lock"

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def checkpoint(self, trial: int) -> Path:
        """The folder of a trial's latest checkpoint."""
        return self.path / "trials" / str(trial) / "checkpoint"

    def test_rows(self, trial: int) -> Path:
        """A confirmation run's results on each test row: `test_rows.py`."""
        return rows_file(self.checkpoint(trial))

    def create(self) -> RunDir:
        """Creates the folder and its parents if they are missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def append_event(self, event: dict[str, Any]) -> None:
        """Appends one line to events.jsonl; `time` (unix seconds) is filled in if it is missing.

        NaN and infinities, which JSON does not have, become null. A last line that a kill cut off
        stays a separate line, which `events` skips.
        """
        line = json.dumps(_jsonable({"time": time.time(), **event}), allow_nan=False) + "\n"
        # One unbuffered write in append mode: lines of several threads never mix.
        with open(self.events_jsonl, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())

    def events(self) -> list[dict[str, Any]]:
        """All events in the order written; lines that are cut off or garbled are left out."""
        try:
            lines = self.events_jsonl.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        events = []
        for line in lines:
            try:
                event = json.loads(line)
                if b"\\u" in line:  # JSON may have lone halves of characters; no table or file may
                    whole = json.dumps(event, ensure_ascii=False).encode(errors="replace")
                    event = json.loads(whole)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                events.append(event)
        return events

    def write_atomic(self, path: str | Path, content: str | bytes) -> Path:
        """Replaces a whole file atomically: neither a reader nor a kill ever leaves half of it.

        `path` is relative to the run directory unless it is absolute. Text with a password in it is
        for its owner alone to read.
        """
        path = self.path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone half of a character, as JSON and YAML may have, is written as its number.
        data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if isinstance(content, str) and without_passwords(content) != content:
                temporary.touch(mode=0o600)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the run for this process; the kernel releases the lock however the process ends.

        Raises ConfigError while another process holds it. A POSIX record lock rather than flock:
        children that a command forks (swarm servers) must not keep the run locked after it.
        """
        if self.path in _locked_here:
            raise ConfigError(f"{self.path} is already in use by this process")
        try:
            self.create()
            opened = open(self.lock_file, "a+")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ConfigError(f"--out: {self.path} cannot be written: {error.strerror}.") from None
        with opened as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise ConfigError(
                    f"{self.path} is in use by another command (process {owner}); "
                    "wait for it to end, stop it, or choose another --out"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            _locked_here.add(self.path)
            try:
                yield
            finally:
                _locked_here.discard(self.path)

    def in_use(self) -> bool:
        """Whether a process, this one included, holds the lock."""
        if self.path in _locked_here:
            return True  # opening and closing the file would drop our own lock
        try:
            with open(self.lock_file, "r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def rows_file(checkpoint: Path) -> Path:
    """The file of test rows that belongs to this checkpoint."""
    return checkpoint.parent / "test_rows.npz"


def population_state(checkpoint: Path, step: int) -> Path:
    """The state of a population's trial after `step` steps, in its checkpoint's folder."""
    return checkpoint / f"step-{step:08d}.pt"


def _jsonable(value: Any) -> Any:
    """`value` with NaN and infinities as None, numpy scalars and paths as plain ones."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_jsonable(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):  # a numpy or torch scalar; neither is imported here
        return _jsonable(value.item())
    return str(value)
