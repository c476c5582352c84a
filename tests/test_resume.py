"""Searches that are killed and go on: nothing lost, repeated, counted twice or left running."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import optuna
import pandas as pd
import pytest

from benchmarks.kill_and_resume import (
    Search,
    check_nothing_is_lost,
    ended,
    kill_and_resume,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRIALS = 4
SHORT = ["--trials", str(TRIALS), "--steps", "10", "--batch-size", "2", "--confirm", "0"]
SHORT += ["--eval-rows", "16"]


def test_killed_at_random_points(tmp_path: Path) -> None:
    """The command, a trial, its host and Ray, in a random order; 20 and more such kills are
    `python -m benchmarks.kill_and_resume`, which is too long for every day."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    targets = ["command", "host", "trial"]
    rng.shuffle(targets)
    targets.append(rng.choice(["gcs", "raylet"]))
    try:
        kills = kill_and_resume(tmp_path / "run", targets, rng)
    except BaseException:
        print(f"seed {seed}")
        raise
    # All trials may have ended before the last moment has come.
    assert len(kills) >= 2, seed


def test_interrupted_like_in_a_terminal_then_resumed(tmp_path: Path) -> None:
    """By a terminal that closes, then by Ctrl-C: each goes to the whole process group."""
    run = tmp_path / "run"
    search = Search(*SHORT, "--scheduler", "none", "--concurrency", "1", "--out", str(run))
    for signum, then in ((signal.SIGHUP, "ray"), (signal.SIGINT, "in-process")):
        before = len(ended(run))
        assert search.wait_until(lambda before=before: len(ended(run)) > before)
        os.killpg(search.process.pid, signum)

        assert search.wait(60) == 128 + signum
        search.check_nothing_is_left()
        assert len(pd.read_csv(run / "trials.csv")) > before
        study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
        assert "RUNNING" not in {trial.state.name for trial in study.trials}
        search = Search("--resume", str(run), "--executor", then)
    assert search.wait() == 0, search.process.stderr.read()
    check_nothing_is_lost(run, TRIALS)
    search.check_nothing_is_left()
