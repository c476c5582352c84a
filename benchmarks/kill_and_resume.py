"""What a search that is killed again and again loses: nothing.

    python -m benchmarks.kill_and_resume [--kills 20] [--seed 0] [--backbone swarm]

Searches on the demo model in process, or on a private swarm. At random moments one of these is
killed with SIGKILL: the command, its trial host, a trial's actor, Ray's gcs_server or raylet, or on
a swarm a server. A search that this ends is
gone on with (--resume), until all trials have ended. Then `check_nothing_is_lost` holds the events,
the Optuna study and trials.csv against each other. The moments follow from the seed as far as the
machine's speed allows: a kill comes after so many reports, and a moment later.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil

TRIALS, STEPS, EVALUATIONS = 6, 20, 5
SEARCH = [sys.executable, "-m", "tune_app.search", "--backbone", "local", "--quiet"]
SHORT = ["--trials", str(TRIALS), "--steps", str(STEPS), "--batch-size", "2", "--confirm", "0"]
# What a target's process is called; the first three need not end the search.
TARGETS = {
    "trial": "ray::Trial",
    "host": "ray::TrialHost",
    "raylet": "raylet",
    "gcs": "gcs_server",
    "command": "",
    "server": "",  # of a private swarm
}
# Ray's agents look for a head that was killed for a minute before they go, and disturb nobody.
LATE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_PATIENCE_S = 240.0  # of a machine that is busy with other things


class Search:
    """The command in a process group of its own, with a mark on all that it starts."""

    def __init__(self, *arguments: str) -> None:
        self._mark = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()  # some of Ray's processes hide their mark
        self.process = subprocess.Popen(
            [*SEARCH, *arguments],
            env=os.environ | {"TUNE_APP_SEARCH": self._mark},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def find(self, target: str) -> list[psutil.Process]:
        """The target's processes, at this moment."""
        command = psutil.Process(self.process.pid)
        if target == "command":
            return [command]
        found = []
        for process in command.children(recursive=True):
            self._seen.add(process)
            if target == "server":
                if serves(process) and depth(process) == 1:
                    found.append(process)
                continue
            try:
                name = process.cmdline()[0] if target in ("trial", "host") else process.name()
            except (psutil.Error, IndexError):
                continue
            host = name.startswith(TARGETS["host"])
            if name.startswith(TARGETS[target]) and host == (target == "host"):
                found.append(process)
        return found

    def wait(self, timeout_s: float = _PATIENCE_S) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def wait_until(self, condition: Callable[[], Any]) -> bool:
        """Whether the condition held before the command ended."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.runs:
            try:
                if condition():
                    return True
            except psutil.NoSuchProcess:
                pass
            assert time.monotonic() < deadline, "the search hangs"
            time.sleep(0.02)
        return False

    def check_nothing_is_left(self, within_s: float = 120) -> None:
        """All processes that the command started end with it, or soon after (but for LATE): a
        worker of Ray that is just being started looks for its raylet once it has imported Ray."""
        deadline = time.monotonic() + within_s
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left

    def _left(self) -> list[str]:
        found = []
        for process in {*psutil.process_iter(), *self._seen}:
            try:
                ours = process in self._seen or (
                    process.environ().get("TUNE_APP_SEARCH") == self._mark
                )
                alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
                name = " ".join(process.cmdline()).strip()
                if ours and alive and name not in LATE:
                    found.append(name)
            except psutil.Error:
                continue
        return found


def serves(process: psutil.Process) -> bool:
    """Whether it belongs to a private swarm's servers: their supervisor and all that it forks."""
    try:
        return any("server_process" in word for word in process.cmdline())
    except psutil.Error:
        return False


def depth(process: psutil.Process) -> int:
    """0: the supervisor, 1: a server, 2: what a server has forked."""
    parent = process.parent()
    return 1 + depth(parent) if parent and serves(parent) else 0


@dataclass(frozen=True)
class Kill:
    """exit_code: of the command, if it was waited for; lasted_s: until its processes had ended."""

    target: str
    reports: int  # that had arrived
    ended: int  # trials that had ended
    exit_code: int | None
    lasted_s: float


def kill_and_resume(
    run: Path, targets: Sequence[str], rng: random.Random, backbone: str = "local"
) -> list[Kill]:
    """One search, in the new folder `run`, with a kill of each target in this order.

    A raylet belongs last: a search may do without it until its end. Fewer kills come back where the
    search ended before their moments. Raises AssertionError where anything was lost.
    """
    moments = sorted(rng.randrange(TRIALS * EVALUATIONS * 3 // 4) for _ in targets)
    delays = [rng.uniform(0, 0.5) for _ in targets]
    search, kills = _start(run, backbone), []
    for target, moment, delay in zip(targets, moments, delays, strict=True):
        while not search.wait_until(partial(_is_time, search, target, run, moment)):
            if search.wait() == 0:
                return kills
            search = _start(run, backbone)
        time.sleep(delay)
        kills.append(_kill(search, target, run, rng))
        if not search.runs and search.wait() != 0:
            search = _start(run, backbone)
    code = search.wait()
    assert code == 0, search.process.stderr.read()
    search.check_nothing_is_left()
    check_nothing_is_lost(run)
    return kills


def _is_time(search: Search, target: str, run: Path, moment: int) -> bool:
    return reports(run) >= moment and bool(search.find(target))


def _start(run: Path, backbone: str) -> Search:
    """The search in `run`: begun, or gone on with where there is anything to go on with."""
    begun = (run / "events.jsonl").exists()
    given = ["--resume", str(run)] if begun else [*SHORT, "--out", str(run)]
    return Search(f"--backbone={backbone}", *given)


def _kill(search: Search, target: str, run: Path, rng: random.Random) -> Kill:
    search.find("trial")  # so that what is running now is looked for afterwards
    victims = search.find(target) if search.runs else []
    before, began = ended(run), time.monotonic()
    if victims:
        rng.choice(victims).kill()
    code = None
    if target in ("command", "gcs", "raylet"):
        code = search.wait()
        search.check_nothing_is_left()
    assert before <= ended(run)
    return Kill(target, reports(run), len(before), code, time.monotonic() - began)


def events(run: Path) -> list[dict[str, Any]]:
    """Those that are whole: a kill may cut off the last one."""
    found = []
    if (run / "events.jsonl").exists():
        for line in (run / "events.jsonl").read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def reports(run: Path) -> int:
    return len({(e["trial"], e["step"]) for e in events(run) if e["event"] == "report"})


def ended(run: Path) -> set[int]:
    return {e["trial"] for e in events(run) if e["event"] == "trial_ended"}


def check_nothing_is_lost(run: Path, trials: int = TRIALS) -> None:
    """Raises AssertionError unless study, events and trials.csv tell of the same `trials` trials,
    each ended once, none of them failed or running, and none that went back behind a report."""
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
    told = {trial.number: trial for trial in study.trials}
    table = pd.read_csv(run / "trials.csv").set_index("trial")
    assert sorted(table.index) == sorted(told) == list(range(trials))
    for number, trial in told.items():
        row = table.loc[number]
        if trial.state.name == "COMPLETE":
            assert row["status"] in ("finished", "diverged"), row
            assert abs(trial.value - row["objective"]) < 1e-9, row
        else:
            assert (trial.state.name, row["status"]) == ("PRUNED", "stopped"), row
    assert check_events(run) == set(range(trials))


def check_events(run: Path) -> set[int]:
    """The trials that have ended; raises AssertionError where one continues after its end, goes
    back behind a report, or has failed."""
    steps: dict[int, int] = {}
    over: set[int] = set()
    for event in events(run):
        number = event.get("trial")
        assert number not in over, f"trial {number} goes on after its end: {event}"
        if event["event"] == "report":
            # It repeats its last report at most: the host keeps the state before it is reported.
            assert event["step"] >= steps.get(number, 0), event
            steps[number] = event["step"]
        elif event["event"] == "trial_ended":
            assert event["status"] != "failed", event
            over.add(number)
    return over


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="at least so many (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", choices=["local", "swarm"], default="local")
    options = parser.parse_args(argv)
    rng, kills, searches = random.Random(options.seed), list[Kill](), 0
    with tempfile.TemporaryDirectory() as folder:
        while len(kills) < options.kills:
            targets = [target for target in TARGETS if target not in ("raylet", "server")]
            targets += ["server"] if options.backbone == "swarm" else []
            rng.shuffle(targets)
            place = Path(folder, str(searches))
            found = kill_and_resume(place, [*targets, "raylet"], rng, options.backbone)
            searches += 1
            for kill in found:
                print(f"search {searches}: {kill}", flush=True)
            kills += found
    print("\n| killed | times | searches it ended | seconds until all its processes had ended |")
    print("| --- | --- | --- | --- |")
    for target in TARGETS:
        if not (of := [kill for kill in kills if kill.target == target]):
            continue
        fatal = [kill for kill in of if kill.exit_code not in (None, 0)]
        most = f"{max(kill.lasted_s for kill in fatal):.1f} at most" if fatal else ""
        print(f"| {target} | {len(of)} | {len(fatal)} | {most} |")
    print(f"\n{len(kills)} kills in {searches} searches of {TRIALS} trials, seed {options.seed}: ")
    print("no trial lost, repeated, counted twice, failed or left running.")


if __name__ == "__main__":
    main()
