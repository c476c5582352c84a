"""Whether a search of very many short trials grows: its processes' memory, open files, threads.

    python -m benchmarks.soak [--trials 1000]

One search on a private swarm. After every twentieth trial all of its processes are looked at. From
the hundredth trial on nothing may grow: the last quarter's median is compared with the first's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from benchmarks.kill_and_resume import Search, ended
from benchmarks.kill_tree import role_of

_EVERY = 20  # trials
_WARM = 100  # trials, in which pools fill, modules are loaded and actors are started
SHORT = ["--steps", "2", "--batch-size", "1", "--eval-rows", "8", "--scheduler", "none"]
SEARCH = ["--backbone=swarm", "--confirm", "0", "--sampler", "random", "--concurrency", "8", *SHORT]
_SHARE = 1.1  # by which a figure may differ, and
_SLACK = {"MB": 8.0, "files": 8.0, "threads": 4.0}  # by how much more


@dataclass
class Series:
    """What the processes of one role had together, and how many there were, at each look."""

    trials: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def quarters(self, figure: str) -> tuple[float, float]:
        """Medians of the first and the last quarter of what came after the warm-up."""
        known = zip(self.trials, self.figures[figure], strict=True)
        values = [value for trials, value in known if trials >= _WARM]
        size = max(1, len(values) // 4)
        return median(values[:size]), median(values[-size:])

    def grows(self) -> list[str]:
        grown = []
        for figure, slack in _SLACK.items():
            first, last = self.quarters(figure)
            if last > first * _SHARE + slack:
                grown.append(figure)
        return grown


def _figures(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "processes": 1,
            "MB": process.memory_info().rss / 2**20,
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }


def _look(search: Search) -> dict[str, dict[str, float]]:
    """Role -> sums over its processes."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    command = psutil.Process(search.process.pid)
    for process in [command, *command.children(recursive=True)]:
        try:
            role, figures = role_of(process, command), _figures(process)
        except psutil.Error:  # it has just ended
            continue
        for name, value in figures.items():
            found[role][name] += value
    return found


def soak(run: Path, trials: int, said: Callable[[str], None]) -> dict[str, Series]:
    """One search of so many trials in the new folder `run`, looked at on the way."""
    series: dict[str, Series] = defaultdict(Series)
    search, began = Search(*SEARCH, "--trials", str(trials), "--out", str(run)), time.monotonic()
    for goal in range(_EVERY, trials, _EVERY):
        if not search.wait_until(lambda goal=goal: len(ended(run)) >= goal):
            break
        now = len(ended(run))
        for role, figures in _look(search).items():
            series[role].trials.append(now)
            for name, value in figures.items():
                series[role].figures[name].append(value)
        said(f"{now} trials, {time.monotonic() - began:.0f} s")
    code = search.process.wait(600)
    assert code == 0, search.process.stderr.read()
    search.check_nothing_is_left()
    return series


def table(series: dict[str, Series]) -> Iterator[str]:
    yield "| process | how many | MB | open files | threads | grows |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for role, of in sorted(series.items()):
        if max(of.trials) < _WARM or len(of.trials) < 4:
            continue
        both = (of.quarters(name) for name in ("processes", "MB", "files", "threads"))
        cells = " | ".join(f"{first:.0f} to {last:.0f}" for first, last in both)
        yield f"| {role} | {cells} | {', '.join(of.grows())} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args(argv)

    def said(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        series = soak(Path(folder, "run"), options.trials, said)
    print(f"{options.trials} trials; from trial {_WARM} on, first to last quarter:\n")
    print("\n".join(table(series)))
    return int(any(of.grows() for of in series.values() if max(of.trials) >= _WARM))


if __name__ == "__main__":
    sys.exit(main())
