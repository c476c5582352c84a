"""Arm F: tune_app itself, the command `python -m tune_app.search` as a user gives it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import Workload


def run(workload: Workload, at_once: int) -> dict[str, Any]:
    """Timed: from the event search_started to search_ended, so with Ray, hosts and swarm ready and
    the model loaded; suggestions, the study, early-stopping hooks, events and loggers included."""
    from tune_app.run.run_dir import RunDir
    from tune_app.search.cli import main

    folder = Path(tempfile.mkdtemp(prefix="tune_app-bench-"))
    try:
        config, run = folder / "search.yaml", RunDir(folder / "run")
        config.write_text(workload.search_config(at_once).to_yaml())
        if main(["--config", str(config), "--out", str(run.path)]) != 0:
            raise RuntimeError("the search did not end well")
        return _from_events(run.events(), workload, at_once)
    finally:
        shutil.rmtree(folder)


def _from_events(events: list[dict[str, Any]], workload: Workload, at_once: int) -> dict[str, Any]:
    began = next(event["time"] for event in events if event["event"] == "search_started")
    ended = next(event for event in events if event["event"] == "search_ended")
    started = {e["trial"]: e for e in events if e["event"] == "trial_started"}
    reports: dict[int, list[dict[str, Any]]] = {number: [] for number in started}
    for event in events:
        if event["event"] == "report":
            reports[event["trial"]].append(event)
    finished = [n for n, of_trial in reports.items() if of_trial[-1]["step"] == workload.steps]
    if len(finished) != workload.trials:
        raise RuntimeError(f"{len(finished)} of {workload.trials} trials finished")
    host = ended["hosts"][0]
    return {
        "seconds": ended["time"] - began,
        "losses": [reports[number][-1]["eval_loss"] for number in sorted(started)],
        "rows_per_s": _steady_rows_per_s(started, reports, workload, at_once),
        "occupancy": host["occupancy"],
        "packs": host["packs"],
    }


def _steady_rows_per_s(
    started: dict[int, dict[str, Any]],
    reports: dict[int, list[dict[str, Any]]],
    workload: Workload,
    at_once: int,
) -> float | None:
    """Training rows per second while the first `at_once` trials all run; None if they never do.

    From the last one's start to the first one's end; a trial's steps between two of its reports are
    taken as evenly spread.
    """
    first = range(min(at_once, workload.trials))
    begin = max(started[number]["time"] for number in first)
    end = min(reports[number][-1]["time"] for number in first)
    if end <= begin:
        return None
    steps = 0.0
    for number in first:
        times = [started[number]["time"], *(report["time"] for report in reports[number])]
        done = [0, *(report["step"] for report in reports[number])]
        steps += float(np.interp(end, times, done) - np.interp(begin, times, done))
    return steps * workload.rows / (end - begin)
