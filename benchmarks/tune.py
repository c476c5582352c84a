"""Arm F: tune_app itself, `tune_app.tuning.search` on a cluster that is ready."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import Workload


def run(workload: Workload, at_once: int) -> dict[str, Any]:
    """Timed: all of `search()`, from opening the study to the last trial's end."""
    from tune_app.cluster import cluster
    from tune_app.live import LiveView
    from tune_app.run_dir import RunDir
    from tune_app.search import Ending
    from tune_app.tuning import search

    folder = Path(tempfile.mkdtemp(prefix="tune_app-bench-"))
    try:
        config = workload.search_config(at_once, out=folder)
        run, live, ending = RunDir(folder), LiveView(config, RunDir(folder)), Ending(config)
        with cluster(config, progress=lambda text: None) as machines:
            began = time.monotonic()
            search(config, workload.space, run, machines, live, ending)
            seconds = time.monotonic() - began
        return {"seconds": seconds, **_from_events(run.events(), workload, at_once)}
    finally:
        shutil.rmtree(folder)


def _from_events(events: list[dict[str, Any]], workload: Workload, at_once: int) -> dict[str, Any]:
    started = {e["trial"]: e for e in events if e["event"] == "trial_started"}
    reports: dict[int, list[dict[str, Any]]] = {number: [] for number in started}
    for event in events:
        if event["event"] == "report":
            reports[event["trial"]].append(event)
    unfinished = [n for n, of_trial in reports.items() if of_trial[-1]["step"] < workload.steps]
    if unfinished or len(started) < workload.trials:
        raise RuntimeError(f"trials {unfinished} did not finish: {events[-5:]}")
    host = events[-1]["hosts"][0]
    return {
        "losses": [reports[number][-1]["eval_loss"] for number in sorted(started)],
        "rows_per_s": _steady_rows_per_s(started, reports, workload, at_once),
        "occupancy": host["occupancy"],
        "packs": host["packs"],
    }


def _steady_rows_per_s(started, reports, workload: Workload, at_once: int) -> float:
    """Training rows per second while the first `at_once` trials all run.

    From the last one's start to the first one's end; a trial's steps between two of its reports are
    taken as evenly spread.
    """
    first = range(min(at_once, workload.trials))
    begin = max(started[number]["time"] for number in first)
    end = min(reports[number][-1]["time"] for number in first)
    steps = 0.0
    for number in first:
        times = [started[number]["time"], *(report["time"] for report in reports[number])]
        done = [0, *(report["step"] for report in reports[number])]
        steps += float(np.interp(end, times, done) - np.interp(begin, times, done))
    return steps * workload.rows / (end - begin)
