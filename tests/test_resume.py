"""Searches that are killed and go on: nothing lost, repeated, counted twice or left running."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import psutil
import pytest

pytestmark = pytest.mark.slow

TRIALS = 4
SEARCH = [sys.executable, "-m", "tune_app.search", "--backbone", "local", "--quiet"]
SHORT = ["--trials", str(TRIALS), "--steps", "10", "--batch-size", "2", "--confirm", "0"]


class Search:
    """The command in a process group of its own, with a mark on all that it starts."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*SEARCH, *arguments],
            env=os.environ | {"TUNE_APP_TEST": self.mark},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("TUNE_APP_TEST") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait(self, timeout_s: float = 120) -> int:
        return self.process.wait(timeout_s)

    def check_nothing_is_left(self, within_s: float = 30) -> None:
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [process.cmdline() for process in left] == []


def wait_for(condition, search: Search, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and search.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lines(run: Path) -> list[dict]:
    found = []
    if (run / "events.jsonl").exists():
        for line in (run / "events.jsonl").read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def count(run: Path, event: str) -> int:
    return sum(line["event"] == event for line in lines(run))


def check_agreement(run: Path) -> None:
    """The study, the events and trials.csv tell of the same trials, each ended once."""
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
    states = {trial.number: trial.state.name for trial in study.trials}
    table = pd.read_csv(run / "trials.csv").set_index("trial")
    expected = {"COMPLETE": {"finished", "diverged"}, "PRUNED": {"stopped"}, "FAIL": {"failed"}}

    assert sorted(table.index) == sorted(states) == list(range(TRIALS))
    for trial, state in states.items():
        assert table.loc[trial, "status"] in expected[state]
    ends = Counter(line["trial"] for line in lines(run) if line["event"] == "trial_ended")
    assert set(ends.values()) == {1}


def resume(run: Path) -> None:
    search = Search("--resume", str(run))
    assert search.wait() == 0, search.process.stderr.read()
    check_agreement(run)
    search.check_nothing_is_left()


def test_killed_at_a_random_point(tmp_path: Path) -> None:
    run, seed = tmp_path / "run", random.randrange(10**6)
    search = Search(*SHORT, "--out", str(run))
    wait_for(lambda: count(run, "report") >= 1, search)
    time.sleep(random.Random(seed).uniform(0, 2))
    search.process.kill()
    search.check_nothing_is_left()
    finished = {e["trial"] for e in lines(run) if e["event"] == "trial_ended"}

    resume(run)

    starts = Counter(e["trial"] for e in lines(run) if e["event"] == "trial_started")
    assert {starts[trial] for trial in finished} <= {1}, seed


def test_interrupted_like_in_a_terminal_then_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = Search(*SHORT, "--scheduler", "none", "--concurrency", "1", "--out", str(run))
    wait_for(lambda: count(run, "trial_ended") >= 1, search)
    os.killpg(search.process.pid, signal.SIGINT)

    assert search.wait(60) == 130
    search.check_nothing_is_left()
    assert (run / "trials.csv").exists()
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
    assert "RUNNING" not in {trial.state.name for trial in study.trials}
    resume(run)
