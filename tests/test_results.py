"""Results: every trial a row, the right winner, a plain answer, whatever became of the run."""

from __future__ import annotations

import io
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from synthetic_runs import write_run

from tune_app.report.results import load
from tune_app.report.summary import next_steps, summary
from tune_app.report.tables import write_tables
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import TrialConfig

SHAPES = {
    "usual": {},
    "one": {"trials": 1},
    "none": {"trials": 0},
    "diverged": {"trials": 8, "diverge": 1.0},
    "died": {"trials": 12, "ended": False},
    "confirmed": {"trials": 30, "confirm_seeds": 3},
    "before looks": {"trials": 30, "confirm_seeds": 3, "looks": False},
    "causal-lm": {"task": "causal-lm"},
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run", trials=24)


def _report(run: RunDir, trial: int, step: int, loss: float | None, **more: object) -> None:
    run.append_event({"event": "report", "trial": trial, "step": step, "eval_loss": loss, **more})


def _start(run: RunDir, trial: int, origin: str = "suggested", **config: object) -> None:
    event = {"event": "trial_started", "trial": trial, "origin": origin}
    run.append_event({**event, "config": config})


def _end(run: RunDir, trial: int, status: str = "finished", reason: str = "") -> None:
    event = {"event": "trial_ended", "trial": trial, "status": status}
    run.append_event({**event, "reason": reason})


def test_every_trial_has_a_row_with_its_whole_config_and_final_figures(run: RunDir):
    results = load(run)
    assert sorted(results.trials["trial"]) == list(range(24))
    assert set(TrialConfig().to_dict()) <= set(results.trials)
    events = run.events()
    for row in results.trials.itertuples():
        last = [e for e in events if e["event"] == "report" and e["trial"] == row.trial][-1]
        assert row.step == last["step"]
        assert row.tokens == last["tokens"]
        expected = math.nan if last["eval_loss"] is None else last["eval_loss"]
        np.testing.assert_equal(row.eval_loss, expected)
    assert len(results.history) == sum(event["event"] == "report" for event in events)


def test_best_first_and_only_finished_trials_win(tmp_path: Path):
    run = RunDir(tmp_path).create()
    ends = [
        (0, 2.0, "finished"),
        (1, 1.2, "stopped"),
        (2, None, "diverged"),
        (3, 1.5, "finished"),
        (4, 1.1, "failed"),
        (5, None, "finished"),  # finished without a finite loss: it cannot win
    ]
    for trial, loss, status in ends:
        _start(run, trial, lr=0.1)
        _report(run, trial, 10, loss)
        _end(run, trial, status, "why")
    results = load(run)
    assert list(results.trials["trial"]) == [3, 0, 5, 1, 2, 4]
    assert results.best is not None
    assert results.best["trial"] == 3
    assert results.counts[Status.FINISHED] == 3


def test_a_trial_that_went_on_from_a_checkpoint_counts_once(tmp_path: Path):
    run = RunDir(tmp_path).create()
    _start(run, 1, lr=0.1)
    for step, loss in ((10, 2.0), (20, 1.9), (30, 1.0)):
        _report(run, 1, step, loss)
    _end(run, 1, "failed", "server gone")
    _start(run, 1, lr=0.1)
    _report(run, 1, 20, 1.8)
    history = load(run).history
    assert list(history["step"]) == [10, 20]  # step 30 belongs to the life that was lost
    assert list(history["eval_loss"]) == [2.0, 1.8]
    assert list(load(run).trials["status"]) == [Status.INTERRUPTED]
    with run.lock():
        assert list(load(run).trials["status"]) == [Status.RUNNING]
        run.append_event({"event": "search_ended", "reason": "done"})
        assert list(load(run).trials["status"]) == [Status.INTERRUPTED]
        run.append_event({"event": "search_resumed"})
        assert list(load(run).trials["status"]) == [Status.RUNNING]


def test_pauses_do_not_count_as_time(tmp_path: Path):
    run = RunDir(tmp_path).create()
    clock = [("search_started", 0), ("x", 60), ("search_resumed", 5000), ("search_ended", 5030)]
    for name, time in clock:
        run.append_event({"event": name, "time": 1e9 + time})
    assert load(run).seconds == 90


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_summary_works_for_every_run_and_keeps_to_the_width(
    tmp_path: Path, shape: str, width: int
):
    run = write_run(tmp_path / "r", **SHAPES[shape])  # type: ignore[arg-type]
    text = summary(write_tables(run), width)
    assert "nan" not in text.replace("eval_loss is nan", "").lower()
    assert "<NA>" not in text
    commands = ("In /", "Report:", "Study:", "Use the", "Train it", "Add trials:", "Continue:")
    for line in text.splitlines():
        assert len(line) <= width or line.startswith(commands), line


def test_a_narrow_terminal_keeps_the_intervals_whole(tmp_path: Path):
    run = write_run(tmp_path / "run", trials=20, confirm_seeds=3)
    text = summary(load(run), 76)
    intervals = [line for line in text.splitlines() if line.startswith("trial ") and "(" in line]
    assert len(intervals) == 1
    assert all(line.endswith(")") for line in intervals)


def test_what_to_open_is_named_without_a_password(tmp_path: Path):
    run = write_run(tmp_path / "my run", trials=3)
    run.ray.mkdir()
    study = optuna.create_study(study_name="tune_app", storage=f"sqlite:///{run.study_db}")
    study.enqueue_trial({"lr": 0.1})
    lines = dict(line.split(":", 1) for line in next_steps(load(run)))

    assert lines["Report"].strip() == str(run.report_html)
    assert shlex.split(lines["Curves"]) == ["tensorboard", "--logdir", str(run.ray)]
    command, url = shlex.split(lines["Study"])
    assert command == "optuna-dashboard"
    assert len(optuna.load_study(study_name="tune_app", storage=url).trials) == 1

    settings = {
        "storage": "postgresql://me:s3cret@db.example/optuna",
        "mlflow": "http://me:s3cret@m:5000",
    }
    run.write_atomic(run.search_yaml, yaml.safe_dump({**settings, "wandb": "prompts"}))
    assert run.search_yaml.stat().st_mode & 0o077 == 0  # nobody else reads it
    text = "\n".join(next_steps(load(run)))
    assert "optuna-dashboard 'postgresql://me:***@db.example/optuna'" in text
    assert "s3cret" not in text
    assert "http://me:***@m:5000, experiment my run" in text
    assert "project prompts, group my run" in text


def test_an_empty_folder_and_a_lone_broken_file_still_open(tmp_path: Path):
    run = RunDir(tmp_path).create()
    assert "No trial was started" in summary(load(run))
    run.events_jsonl.write_bytes(b'{"event": "trial_star')
    run.search_yaml.write_text("{broken: [")
    run.study_db.write_bytes(b"SQLite format 3\x00 cut off")
    assert load(write_tables(run).run).trials.empty


def test_long_searches_are_cut_and_failures_explained(tmp_path: Path):
    run = write_run(tmp_path / "run", trials=100)
    text = summary(load(run), 120)
    assert "… 70 more in trials.csv" in text
    assert "Trial 11 failed: RuntimeError: no server holds blocks 2:4" in text
    assert len(text.splitlines()) < 75


def test_tables_hold_what_the_frames_hold(run: RunDir):
    results = write_tables(run)
    trials = pd.read_csv(run.trials_csv)
    assert list(trials["trial"]) == list(results.trials["trial"])
    np.testing.assert_array_equal(trials["eval_loss"], results.trials["eval_loss"].astype(float))
    assert len(pd.read_csv(run.history_csv)) == len(results.history)
    best = yaml.safe_load(run.best_yaml.read_text())
    assert best["task"] == "classification"
    assert "out" not in best  # a second search must not write into this run
    assert results.best is not None
    assert best["trial"] == results.configs[int(results.best["trial"])]
    assert TrialConfig(**best["trial"]).lr == results.best["lr"]


def test_results_import_neither_torch_nor_ray():
    code = (
        "import sys, tune_app.report.results;"
        "print({'torch', 'transformers', 'ray', 'petals'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_csv_keeps_its_shape_when_texts_hold_commas_quotes_and_line_breaks(run: RunDir):
    _start(run, 99, lr=0.1)
    _end(run, 99, "failed", 'a, "b"\n<script>alert(1)</script>')
    write_tables(run)
    table = pd.read_csv(io.StringIO(run.trials_csv.read_text()))
    row = table[table["trial"] == 99].iloc[0]
    assert row["reason"] == 'a, "b"\n<script>alert(1)</script>'
    assert 'Trial 99 failed: a, "b"\n' in summary(load(run))


@pytest.mark.parametrize(("retries", "said"), [(1, "1 retry,"), (3, "3 retries,")])
def test_what_each_host_did_is_one_line(run: RunDir, retries: int, said: str) -> None:
    ended = run.events()[-1]
    run.append_event(ended | {"hosts": [ended["hosts"][0] | {"retries": retries}]})
    line = next(line for line in summary(load(run), 200).splitlines() if "host-0" in line)
    assert line == (
        "host-0: packs 91% full, 121 rows/s, 5,830 tokens/s, 824 requests, "
        f"{said} 31 s waiting for the backbone"
    )
