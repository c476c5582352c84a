"""How long nothing moves when one process of a search on a private swarm is killed.

    python -m benchmarks.kill_tree [--only server,host]

One search on the demo model. Each process in its tree is killed with SIGKILL, one after the other,
and the longest time without a report after it is measured. A search that this ends is resumed
(--resume), which is part of the time. At the end nothing may be lost, and nothing left running.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.kill_and_resume import Search, check_events, depth, reports, serves

_REPORTS = 6  # after a kill; more than trials that run at once
TRIALS = 200  # never reached: the search is ended with its last kill
SHORT = ["--steps", "40", "--batch-size", "2", "--confirm", "0", "--scheduler", "none"]
SEARCH = ["--backbone=swarm", "--trials", str(TRIALS), "--concurrency", "4", *SHORT]


def _p2pd_below(process: psutil.Process) -> psutil.Process:
    return next(child for child in process.children(recursive=True) if child.name() == "p2pd")


def _server(search: Search) -> psutil.Process:
    return search.find("server")[0]


def _supervisor(search: Search) -> psutil.Process:
    supervisor = _server(search).parent()
    assert supervisor is not None
    return supervisor


def _handler(search: Search) -> psutil.Process:
    server = _server(search)
    dht = _p2pd_below(server).parent()
    others = [child for child in server.children() if serves(child) and child != dht]
    return others[0]


def role_of(process: psutil.Process, command: psutil.Process) -> str:
    """What a process below the command is for, in words."""
    if process == command:
        return "command"
    name = (process.cmdline() or [process.name()])[0]
    if name.startswith("ray::"):
        return "trial host" if "TrialHost" in name else "trials' actors and idle workers"
    parent = process.parent()
    if process.name() == "p2pd":
        owner = parent and parent.parent()
        return "server's p2pd" if owner and serves(owner) else "host's p2pd"
    if serves(process):
        return ("supervisor", "server", "server's DHT and handlers")[min(2, depth(process))]
    if parent and "TrialHost" in " ".join(parent.cmdline()[:1]):
        return "host's DHT"
    return process.name()


def _host(search: Search) -> psutil.Process:
    return search.find("host")[0]


# What is killed, and how it is found. The last ones end the search.
TARGETS: dict[str, Callable[[Search], psutil.Process]] = {
    "server": _server,
    "server's DHT": lambda search: _p2pd_below(_server(search)).parent(),
    "server's p2pd": lambda search: _p2pd_below(_server(search)),
    "server's handler": _handler,
    "supervisor of the servers": _supervisor,
    "trial's actor": lambda search: search.find("trial")[0],
    "host": _host,
    "host's DHT": lambda search: _p2pd_below(_host(search)).parent(),
    "host's p2pd": lambda search: _p2pd_below(_host(search)),
    "raylet": lambda search: search.find("raylet")[0],
    "gcs_server": lambda search: search.find("gcs")[0],
    "command": lambda search: search.find("command")[0],
}
ENDS_IT = {"raylet", "gcs_server", "command"}


def kill_each(run: Path, targets: Sequence[str], said: Callable[[str], None]) -> dict[str, float]:
    """The longest time without a report after the kill of each target, in the new folder `run`."""
    search, gaps = Search(*SEARCH, "--out", str(run)), dict[str, float]()
    for target in targets:
        before = reports(run)
        lives = search.wait_until(lambda before=before: reports(run) >= before + _REPORTS)
        assert lives, search.process.stderr.read()
        victim = TARGETS[target](search)
        before, began = reports(run), time.monotonic()
        victim.kill()
        if target in ENDS_IT:
            search.wait()
            search.check_nothing_is_left()
            search = Search("--backbone=swarm", "--resume", str(run))
        gaps[target] = _longest_pause_s(search, run, before, began)
        said(f"| {target} | {gaps[target]:.1f} |")
    search.process.terminate()
    search.wait()
    search.check_nothing_is_left()
    check_events(run)
    return gaps


def _longest_pause_s(search: Search, run: Path, before: int, began: float) -> float:
    """Between the kill and the next reports: the first one may have been on its way."""
    longest = 0.0
    for count in range(before, before + _REPORTS):
        moved = search.wait_until(lambda count=count: reports(run) > count)
        assert moved, search.process.stderr.read()
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
    return longest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", help=f"of {', '.join(TARGETS)}; comma-separated")
    only = parser.parse_args(argv).only
    targets = [name.strip() for name in only.split(",")] if only else list(TARGETS)
    print("| killed | seconds without a report |\n| --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kill_each(Path(folder, "run"), targets, lambda line: print(line, flush=True))
    print("\nNo trial was lost, repeated, counted twice, failed or left running.")


if __name__ == "__main__":
    main()
