"""The live view: what a search says in a pipe and shows in a terminal, event by event."""

import io
import math
import os
import pickle
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tune_app.report.words import DASH
from tune_app.run.events import event_from_json
from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.search.live import LiveView, hosts_in_words, token_command
from tune_app.search.progress import Progress

ROOT = Path(__file__).parents[1]
STARTED: dict = {
    "event": "search_started",
    "trials": 4,
    "metric": "accuracy",
    "sampled": ["lr", "scheduler"],
}
HOST = HostCounters(
    host="host-0",
    packs=10,
    rows=80,
    occupancy=0.8,
    rows_per_s=190.4,
    tokens_per_s=10_000.0,
    retries=3,
    servers=2,
    blocks_served=4,
    blocks=4,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def started(trial: int, of: int | None = None, **config) -> dict:
    event = {"event": "trial_started", "trial": trial, "origin": "suggested"}
    event["config"] = {"lr": 1e-3, "scheduler": "linear", **config}
    return event if of is None else event | {"origin": "confirm", "of": of}


def report(trial: int, step: int, loss: float | None, **values) -> dict:
    return {
        "event": "report",
        "trial": trial,
        "step": step,
        "eval_loss": loss,
        "accuracy": 0.25,
        "seconds": 9.8,
        **values,
    }


def ended(trial: int, status: str = "finished", reason: str = "") -> dict:
    return {"event": "trial_ended", "trial": trial, "status": status, "reason": reason}


def lines_of(tmp_path: Path, events: list[dict], **settings) -> list[str]:
    """What the view prints in a pipe."""
    stream = io.StringIO()
    config = SearchConfig(trials=4, steps=20, **settings)
    with LiveView(config, RunDir(tmp_path), stream) as live:
        for event in events:
            live.listen(event_from_json(event))
    return stream.getvalue().splitlines()


def test_a_pipe_gets_one_line_for_each_trial_that_ended(tmp_path: Path) -> None:
    events = [
        STARTED,
        started(2, lr=1.4e-3, scheduler="cosine"),
        started(1, lr=0.3),
        report(2, 10, 2.1),
        report(1, 10, None, accuracy=None),
        ended(1, "diverged", "the loss exploded or was not finite"),
        report(2, 20, 1.966, accuracy=0.234),
        ended(2),
    ]

    assert lines_of(tmp_path, events) == [
        f"1/4  trial 1  diverged  loss {DASH}  lr 3e-1, linear  9.8 s"
        "  (the loss exploded or was not finite)",
        "2/4  trial 2  finished  loss 1.966, accuracy 0.234  lr 1.4e-3, cosine  9.8 s",
    ]


def test_lines_are_never_wrapped_or_coloured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    events = [STARTED, started(0), report(0, 20, 2.0), ended(0, "failed", "[bold]" + "x" * 200)]

    (line,) = lines_of(tmp_path, events)

    assert line.endswith("([bold]" + "x" * 200 + ")")


def test_quiet_says_nothing_and_verbose_says_each_report(tmp_path: Path) -> None:
    events = [STARTED, started(0), report(0, 10, 2.0), report(0, 20, 1.9), ended(0)]

    assert lines_of(tmp_path, events, quiet=True) == []
    assert len(lines_of(tmp_path, events, verbose=True)) == 3


def test_a_confirmation_is_told_by_what_it_confirms(tmp_path: Path) -> None:
    stream = io.StringIO()
    live = LiveView(SearchConfig(trials=4, confirm_seeds=2), RunDir(tmp_path), stream)
    live.listen(event_from_json(STARTED))
    live.expect(3)
    for number, of in ((100_001, 0), (100_502, 5), (100_501, 5)):  # as they happen to start
        live.listen(event_from_json(started(number, of=of)))
    for number in (100_502, 100_001):
        live.listen(event_from_json(report(number, 100, 1.9)))
        live.listen(event_from_json(ended(number)))

    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("1/3  confirming trial 5, seed 2  finished  loss 1.900")
    assert lines[1].startswith("2/3  confirming the default, seed 1  finished")


def test_a_confirmation_takes_a_line_for_each_config_in_the_display(tmp_path: Path) -> None:
    live = LiveView(SearchConfig(confirm_seeds=3), RunDir(tmp_path), Terminal())
    live.listen(event_from_json(STARTED))
    live.expect(6)
    for of in (0, 5):
        for seed in (2, 1, 3):
            live.listen(event_from_json(started(100_000 + 100 * of + seed, of=of)))
    console = Console(file=io.StringIO(), width=80)
    console.print(live._draw())
    shown = console.file.getvalue()  # type: ignore[attr-defined]

    assert "the default, seeds 1, 2, 3" in shown
    assert "trial 5, seeds 1, 2, 3" in shown
    assert shown.count("seed") == 2


def test_a_resumed_search_goes_on_counting(tmp_path: Path) -> None:
    run, stream = RunDir(tmp_path), io.StringIO()
    resumed = {**STARTED, "event": "search_resumed"}
    for event in (STARTED, started(0), report(0, 20, 2.0), ended(0), started(1), resumed):
        run.append_event(event)
    live = LiveView(SearchConfig(trials=4, steps=20), run, stream)

    for event in (resumed, started(1), report(1, 20, 1.5), ended(1)):
        live.listen(event_from_json(event))

    assert stream.getvalue().startswith("2/4  trial 1  finished  loss 1.500")


def test_the_display_has_what_matters(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with LiveView(SearchConfig(trials=4, steps=20), RunDir(tmp_path), stream) as live:
        for event in (
            STARTED,
            started(0),
            started(1),
            started(2),
            report(0, 10, 2.5),
            report(1, 10, None),
            report(2, 10, 2.25),
            ended(1, "diverged", "not finite"),
            report(0, 20, 2.125),
            ended(0),
        ):
            live.listen(event_from_json(event))
        live.show_hosts([HOST])
        live._live.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())

    assert "2 of 4" in shown
    assert "1 finished  1 diverged  1 running" in shown
    assert "trial 0: loss 2.125, accuracy 0.250" in shown
    assert "lr 1e-3, scheduler linear" in shown
    assert "190 rows/s, 10,000 tokens/s, packs 80% full" in shown
    assert "2 servers, 4 of 4 blocks served, 3 retried" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert not (tmp_path / "events.jsonl").exists()  # it only looks


def test_nothing_is_said_of_hosts_that_have_not_begun() -> None:
    assert hosts_in_words([]) == []
    assert hosts_in_words([HostCounters("host-0")]) == []
    local = replace(HOST, servers=None)
    assert [label for label, _ in hosts_in_words([local])] == ["speed"]


def test_losses_that_are_none_or_nan_are_never_the_best() -> None:
    progress = Progress(SearchConfig(trials=4, steps=20))
    for trial, loss in ((0, None), (1, math.nan), (2, 2.0)):
        for event in (started(trial), report(trial, 20, loss), ended(trial)):
            progress.listen(event_from_json(event))

    assert progress.best is not None
    assert progress.best.number == 2
    (rung,) = progress.rungs
    assert (rung.step, rung.trials, rung.best_loss, rung.median_loss) == (20, 3, 2.0, 2.0)


def test_time_left_follows_from_the_steps_done() -> None:
    clock = Clock()
    progress = Progress(SearchConfig(trials=4, steps=20), clock)
    assert progress.left_s() is None
    progress.listen(event_from_json(started(0)))
    progress.listen(event_from_json(started(1)))
    clock.now = 10.0
    for event in (report(0, 20, 2.0), ended(0), report(1, 20, 2.0), ended(1)):
        progress.listen(event_from_json(event))
    assert progress.left_s() == pytest.approx(10.0)  # two of four, as long again

    clock.now = 20.0
    progress.expect(2)
    assert progress.left_s() == pytest.approx(20.0)  # 40 steps at 40 steps in 20 s
    clock.now = 25.0
    assert progress.left_s() == pytest.approx(15.0)


def test_a_time_budget_bounds_the_time_left() -> None:
    clock = Clock()
    progress = Progress(SearchConfig(trials=1000, steps=20, time_budget=60.0), clock)
    progress.listen(event_from_json(started(0)))
    clock.now = 20.0
    progress.listen(event_from_json(report(0, 20, 2.0)))

    assert progress.left_s() == pytest.approx(40.0)


def test_tune_can_save_the_view_with_its_callbacks(tmp_path: Path) -> None:
    pickle.dumps(LiveView(SearchConfig(), RunDir(tmp_path), Terminal()))


def test_the_token_command_runs() -> None:
    command = token_command().split()

    assert command[-1] == "get-auth-token"
    assert command[0] == "ray" or os.access(command[0], os.X_OK)


_CTRL_C = """
import sys, time
from tune_app.run.search_config import SearchConfig
from tune_app.search.stop_conditions import StopConditions, interruptible
from tune_app.search.live import LiveView
from tune_app.run.events import event_from_json
from tune_app.run.run_dir import RunDir
config = SearchConfig()
ending = StopConditions(config)
with LiveView(config, RunDir(sys.argv[1])) as live, interruptible(ending, live.say):
    live.listen(event_from_json({"event": "search_started", "metric": "accuracy", "sampled": []}))
    while ending.reason is None:
        time.sleep(0.05)
    print("reason:", ending.reason)
"""


def test_ctrl_c_reaches_the_search_while_the_display_is_drawn(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _CTRL_C, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output, deadline, sent = b"", time.monotonic() + 30, False
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            output += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not sent and b"0 of 16" in output:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(ours)

    assert process.wait(timeout=10) == 0
    assert b"reason: interrupted" in output
    assert b"Ctrl-C: finishing up" in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")  # the cursor is back
