"""The run directory: events survive a kill, files are replaced whole, a run has one owner."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tune_app.run.run_dir import RunDir, Status, new_run
from tune_app.run.search_config import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def test_half_a_character_in_an_event_is_replaced(run: RunDir):
    run.events_jsonl.write_text('{"event": "trial_ended", "reason": "\\ud800 \\u00fc"}\n')

    assert run.events() == [{"event": "trial_ended", "reason": "? ü"}]


def test_paths_are_absolute_and_below_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir("a/b")
    assert run.path == tmp_path / "a/b"
    assert not run.path.exists()
    run.create().create()
    assert run.path.is_dir()
    assert run.checkpoint(7) == run.path / "trials/7/checkpoint"


def test_events_come_back_as_written(run: RunDir):
    assert run.events() == []
    run.append_event({"event": "report", "trial": 3, "time": 1.5, "text": "ünï\n\u2028 <b>"})
    run.append_event({"event": "trial_ended", "status": Status.DIVERGED, "where": Path("/x")})
    first, second = run.events()
    assert first == {"event": "report", "trial": 3, "time": 1.5, "text": "ünï\n\u2028 <b>"}
    assert second["status"] == "diverged"
    assert second["where"] == "/x"
    assert second["time"] > 1e9


def test_numbers_that_json_lacks_become_null(run: RunDir):
    nested = {"a": [float("nan"), {"b": -float("inf")}], "c": np.float32("nan"), "d": np.int64(4)}
    run.append_event({"event": "report", "loss": float("inf"), **nested})
    assert b"NaN" not in run.events_jsonl.read_bytes()
    event = run.events()[0]
    assert event["loss"] is None
    assert event["a"] == [None, {"b": None}]
    assert event["c"] is None
    assert event["d"] == 4


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_cut_off_by_a_kill_costs_only_itself(run: RunDir, cut: int):
    for step in range(3):
        run.append_event({"event": "report", "trial": 0, "step": step})
    whole = run.events_jsonl.read_bytes()
    run.events_jsonl.write_bytes(whole[:-cut])
    kept = 3 if cut == 1 else 2  # only the line break gone: the line itself is whole
    assert [event["step"] for event in run.events()] == [*range(kept)]
    run.append_event({"event": "report", "trial": 0, "step": 9})
    assert [event["step"] for event in run.events()] == [*range(kept), 9]


def test_garbled_lines_are_left_out(run: RunDir):
    run.append_event({"event": "a"})
    with open(run.events_jsonl, "ab") as file:
        file.write(b'\x00\x00\xff\xfe\n[1, 2]\n"text"\n{"no": "event"}\n{"event": 3}\n\n')
    run.append_event({"event": "b"})
    assert [event["event"] for event in run.events()] == ["a", "b"]


def test_threads_never_mix_their_lines(run: RunDir):
    def work(trial: int) -> None:
        for step in range(50):
            run.append_event({"event": "report", "trial": trial, "step": step, "pad": "x" * 500})

    threads = [threading.Thread(target=work, args=(trial,)) for trial in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.events()) == 200
    for trial in range(4):
        steps = [event["step"] for event in run.events() if event["trial"] == trial]
        assert steps == list(range(50))


def test_a_file_is_replaced_whole_or_not_at_all(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    run.write_atomic("best.yaml", "old")
    run.write_atomic(run.prompts_json, b"{}")
    assert run.best_yaml.read_text() == "old"
    assert run.prompts_json.exists()

    def no_replace(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="disk full"):
        run.write_atomic("best.yaml", "new")
    assert run.best_yaml.read_text() == "old"
    assert sorted(path.name for path in run.path.iterdir()) == ["best.yaml", "prompts"]


_HOLD = """
import sys, time
from tune_app.run.search_config import ConfigError
from tune_app.run.run_dir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_owner_until_it_ends_or_is_killed(run: RunDir):
    assert not run.in_use()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run.in_use()
        with pytest.raises(ConfigError, match=rf"command \(process {holder.pid}\)"), run.lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert not run.in_use()
    with run.lock():
        assert run.in_use()
        with pytest.raises(ConfigError, match="this process"), run.lock():
            pass
        assert run.in_use()
    assert not run.in_use()


def test_a_forked_child_does_not_keep_the_run(run: RunDir):
    with run.lock():
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        assert not run.in_use()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_looking_at_a_run_leaves_no_trace(tmp_path: Path):
    assert not RunDir(tmp_path / "nowhere").in_use()
    run = RunDir(tmp_path / "run").create()
    run.in_use()
    run.events()
    assert list(run.path.iterdir()) == []


def test_searches_that_begin_in_one_second_have_a_run_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    runs = [new_run("train-") for _ in range(4)]
    assert len({run.path for run in runs}) == 4
    assert all(re.fullmatch(r"train-[-\d]+", run.path.name) for run in runs)
    Path("runs").rename("there")
    Path("runs").write_text("")  # no folder can be made here
    with pytest.raises(ConfigError, match=r"^--out: /\S+ cannot be written: "), new_run().lock():
        pass
