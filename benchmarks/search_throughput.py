"""How fast a search is, against plain Ray Tune and against the bare training loop.

    python -m benchmarks.search_throughput --backbones local --repeats 1

All arms train the same trials on the same rows; README.md in this folder says what each one is.
Writes runs.csv (every single run), throughput.md and throughput.csv into --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import machine, throughput_tables
from benchmarks.arms import ARMS
from benchmarks.relay import free_port, relay
from benchmarks.workload import Workload, write_data
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm

PARTS = ("throughput", "memory", "latency", "overhead", "default")
STOCK = "stock"  # the swarm of Petals' own server
_RELAY_DELAY_MS = 50.0  # in each direction: a round trip of 100 ms
# Losses of the same trial in two arms: float32 sums in another order, over some dozens of steps.
LOSS_TOLERANCE = 2e-3
_ROOT = Path(__file__).resolve().parents[1]


class ArmsDisagree(RuntimeError):
    """Two arms trained the same trial to different losses: one of them computes something else."""


@dataclass(frozen=True)
class Run:
    """One run of one arm."""

    part: str
    backbone: str
    arm: str
    repeat: int
    trials: int
    seconds: float  # of the search itself
    whole_s: float  # of the process: imports, Ray, model, data and the end too
    rows_per_s: float | None = None  # in steady state
    peak_pss_mb: float | None = None  # of the arm's processes, the swarm's not among them
    round_trip_ms: float = 0.0


class Bench:
    """Runs arms in processes of their own, keeps what they measured, compares their losses."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.runs: list[Run] = []
        self._losses: dict[str, list[float]] = {}

    def run(
        self,
        arm: str,
        workload: Workload,
        part: str,
        repeat: int = 0,
        backbone: str | None = None,
        **about: Any,
    ) -> Run:
        """One run. Raises ArmsDisagree, or RuntimeError with the arm's own error."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            command = [sys.executable, "-m", "benchmarks.arms", arm, workload.to_json(), str(file)]
            whole_s, peak_mb = _timed(command, watch_memory=part == "memory")
            result = json.loads(file.read_text())
        self._compare(arm, workload, result["losses"])
        run = Run(
            part,
            backbone or workload.backbone,
            arm,
            repeat,
            workload.trials,
            result["seconds"],
            whole_s,
            result.get("rows_per_s"),
            peak_mb,
            **about,
        )
        self.add(run)
        return run

    def add(self, run: Run) -> None:
        self.runs.append(run)
        print(
            f"{run.part:10} {run.backbone:5} {run.arm:4} {run.trials:4} trials  "
            f"{run.seconds:7.1f} s  (whole process {run.whole_s:.1f} s)",
            flush=True,
        )

    def _compare(self, arm: str, workload: Workload, losses: list[float]) -> None:
        key = replace(workload, peers=(), backbone="local").to_json()
        expected = self._losses.setdefault(key, losses)
        for number, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
            if not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs):
                raise ArmsDisagree(f"{arm}: trial {number} ends at {ours}, elsewhere at {theirs}")

    def throughput(
        self, workload: Workload, arms: Sequence[str], stock: Workload | None = None
    ) -> None:
        """`stock`: the same on Petals' own server, where plain Ray Tune and the bare loop run, too:
        what somebody would have without us."""
        places: list[tuple[str, Workload]] = [(workload.backbone, workload)]
        if stock is not None:
            places.append((STOCK, stock))
        for _, place in places:
            self.warm_up(place)
        runs = [
            (arm, *place) for arm in arms for place in places if arm[0] != "F" or place[0] != STOCK
        ]
        for repeat in range(self.repeats):
            order = list(runs)
            random.Random(repeat).shuffle(order)  # interleaved, in another order each time
            for arm, backbone, place in order:
                self.run(arm, place, "throughput", repeat, backbone)

    def warm_up(self, workload: Workload) -> None:
        """A swarm's first requests are slower; not counted."""
        if workload.peers:
            self.run("A8", replace(workload, trials=8, steps=5), "warm-up")
            self.runs.pop()

    def memory(self, workload: Workload) -> None:
        """Few and many trials at once: what one more of them takes."""
        for arm in ("E2", "E8", "F2", "F8"):
            self.run(arm, replace(workload, trials=int(arm[1:]), steps=10), "memory")

    def latency(self, workload: Workload) -> None:
        """16 trials on a swarm, near and behind a relay."""
        workload = replace(workload, trials=16, steps=20)
        for delay_ms in (0.0, _RELAY_DELAY_MS):
            with on_swarm(workload, delay_ms) as far:
                self.warm_up(far)
                for repeat in range(self.repeats):
                    for arm in ("A16", "F16") if repeat else ("B1", "A16", "F16"):
                        self.run(arm, far, "latency", repeat, round_trip_ms=2 * delay_ms)

    def overhead(self, folder: str) -> None:
        """Trials that hardly train: what the search itself costs."""
        for trials in (100, 1000):
            tiny = Workload(folder, trials=trials, steps=1, rows=1, text_tokens=4, prompt_tokens=1)
            self.run("F8", tiny, "overhead")

    def default_command(self, backbone: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tune_app.search", "--backbone", backbone]
            seconds, _ = _timed([*command, "--out", f"{folder}/run"])
        self.add(Run("default", backbone, "F", 0, 16, seconds, seconds))


def _timed(command: list[str], watch_memory: bool = False) -> tuple[float, float | None]:
    """(seconds, peak PSS in MB). Raises RuntimeError with the end of its output."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if watch_memory:
        with machine.peak_pss(process.pid) as peak:
            output, _ = process.communicate()
    else:
        output, _ = process.communicate()
    seconds = time.monotonic() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return seconds, peak.mb if watch_memory else None


@contextmanager
def on_swarm(
    workload: Workload, delay_ms: float = 0.0, *, stock: bool = False
) -> Iterator[Workload]:
    """The workload on a private swarm of one server, behind a relay if there is a delay."""
    if not delay_ms:
        with private_swarm(ServeConfig(workload.model, stock=stock)) as swarm:
            yield replace(workload, backbone="swarm", peers=tuple(swarm.peers))
        return
    port = free_port()
    with (
        relay(to=port, delay_ms=delay_ms) as far_port,
        private_swarm(ServeConfig(workload.model, port=port, announce_ports=[far_port])) as swarm,
    ):
        yield replace(workload, backbone="swarm", peers=tuple(swarm.peers))


def write_results(out: Path, runs: Sequence[Run], about: dict[str, str]) -> str:
    """The three files; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [vars(run) for run in runs]
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = throughput_tables.summarise(rows)
    table.to_csv(out / "throughput.csv", index=False)
    text = throughput_tables.markdown(table, throughput_tables.headline(rows), about)
    (out / "throughput.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="such as A8 B1 R4 F16")
    parser.add_argument("--backbones", nargs="+", choices=("swarm", "local"), default=None)
    parser.add_argument(
        "--stock-servers",
        action="store_true",
        help="the arms A, E and R on Petals' own server, too, in the same run",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--task", choices=("classification", "causal-lm"), default="classification")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    about, bench = machine.describe(), Bench(args.repeats)
    about["command"] = " ".join(["python -m benchmarks.search_throughput", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        workload = Workload(folder, task=args.task, trials=args.trials, steps=args.steps)
        try:
            run_parts(bench, workload, args)
        finally:  # what was measured before an error or Ctrl-C is kept
            if bench.runs:
                print(write_results(args.out, bench.runs, about))


def run_parts(bench: Bench, workload: Workload, args: argparse.Namespace) -> None:
    backbones, parts = args.backbones or ["swarm", "local"], args.parts
    if "swarm" in backbones:
        with ExitStack() as stack:
            near = stack.enter_context(on_swarm(workload))
            if "throughput" in parts:
                stock = None
                if args.stock_servers:
                    stock = stack.enter_context(on_swarm(workload, stock=True))
                bench.throughput(near, args.arms, stock)
            if "memory" in parts:
                bench.memory(near)
        if "latency" in parts:
            bench.latency(workload)
    if "default" in parts:
        for backbone in backbones:
            bench.default_command(backbone)
    if "local" in backbones:
        if "throughput" in parts:
            bench.throughput(workload, args.arms)
        if "memory" in parts:
            bench.memory(workload)
        if "overhead" in parts:
            bench.overhead(workload.folder)


if __name__ == "__main__":
    main()
