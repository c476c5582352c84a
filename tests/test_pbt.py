"""A population in a whole search that is killed, ends at its budget and goes on; and whose schedule
of configs trains again alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml
from synthetic_runs import write_run

from benchmarks.kill_and_resume import Search, events
from tune_app.report.page.comparison import comparison_page
from tune_app.report.page.page import report_page
from tune_app.report.results import load
from tune_app.report.summary import summary
from tune_app.report.tables import best_yaml, write_tables
from tune_app.run.run_dir import RunDir
from tune_app.run.trial_config import TrialConfig
from tune_app.search.cli import main
from tune_app.train import cli as train

TRIALS, STEPS = 6, 15
HOPELESS = """\
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 3.0e-2}
  weight_decay: {space: choice, categories: [0.0, 0.01, 0.1]}
fixed: {warmup_steps: 0}
enqueue: [{lr: 3.0e-2}, {lr: 3.0e-3}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """Killed after its first round, ended by its budget, and gone on with to its end."""
    folder = tmp_path_factory.mktemp("pbt")
    (folder / "space.yaml").write_text(HOPELESS)
    run = RunDir(folder / "run")
    first = Search(
        *("--scheduler=pbt", f"--space={folder / 'space.yaml'}", f"--trials={TRIALS}"),
        *(f"--steps={STEPS}", "--batch-size=4", "--confirm=0", "--confirm-seeds=1"),
        "--eval-rows=32",
        f"--out={run.path}",
    )
    assert first.wait_until(lambda: rounds_of(run))
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    spent = next(e["tokens"] for e in events(run.path) if e["event"] == "report")  # of one trial
    budget = f"--token-budget={2.5 * spent * TRIALS:.0f}"  # between the second and third round
    second = Search("--resume", str(run.path), budget)
    assert second.wait() == 1, second.process.stderr.read()  # no trial has finished yet
    assert len(rounds_of(run)) == 2
    assert "RUNNING" not in {trial.state.name for trial in study(run).trials}
    third = Search("--resume", str(run.path), "--token-budget=1e9", "--confirm=2")
    assert third.wait() == 0, third.process.stderr.read()
    return run


def rounds_of(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in events(run.path) if event["event"] == "population_changed"]


def study(run: RunDir) -> optuna.Study:
    return optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run.study_db}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_and_no_round_is_held_twice(run: RunDir) -> None:
    searched = pd.read_csv(run.trials_csv)
    assert set(searched["status"]) == {"finished"}
    assert [event["step"] for event in rounds_of(run)] == [3, 6, 9, 12]
    assert any(event["changed"] for event in rounds_of(run))
    assert all(change["trial"] != 0 for event in rounds_of(run) for change in event["changed"])
    told = {trial.number: trial for trial in study(run).trials}
    assert sorted(told) == list(range(TRIALS))
    results = load(run)
    for number, trial in told.items():
        assert trial.state.name == "COMPLETE"
        row = results.trials.set_index("trial").loc[number]
        assert trial.value == pytest.approx(row["objective"])
        assert (
            trial.user_attrs.get("trained", trial.user_attrs["config"]) == results.configs[number]
        )
    began = {e["trial"]: e["config"] for e in reversed(events(run.path)) if "config" in e}
    # 1 is the second baseline; 2 began with the first enqueued config.
    assert told[2].params["lr"] == 0.03 == began[2]["lr"]
    assert results.configs[2]["lr"] < 0.03  # it has gone on from another
    assert "changes" not in results.configs[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tokens_are_those_that_were_computed(run: RunDir) -> None:
    """Same batches for all, so each trial's are the default's, whomever it has gone on from."""
    tokens = pd.read_csv(run.trials_csv).query("origin != 'confirm'")["tokens"]
    assert tokens.nunique() == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_schedule_of_configs_trains_again_alone(run: RunDir, tmp_path: Path) -> None:
    results = load(run)
    rows = results.finished
    number = next(int(n) for n in rows["trial"] if "changes" in results.configs[int(n)])
    (tmp_path / "best.yaml").write_text(best_yaml(results, number))
    again = RunDir(tmp_path / "again")
    told = [f"--config={tmp_path / 'best.yaml'}", f"--out={again.path}", "--quiet"]

    assert train.main(told) == 0

    changes = results.configs[number]["changes"]
    since = changes[-1][0]
    history = results.history.query(f"trial == {number} and step >= {since}")
    alone = load(again).history.query(f"step >= {since}")
    assert list(alone["step"]) == list(history["step"])
    for column in ("eval_loss", "learning_rate"):
        assert list(alone[column]) == pytest.approx(list(history[column]), rel=1e-5)
    card = (again.prompts / "README.md").read_text()
    assert f"after step {since}: " in card


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_results_say_what_changed(run: RunDir) -> None:
    results = load(run)
    confirmed = [e for e in events(run.path) if e["event"] == "trial_started" and "of" in e]
    # Two configs with two seeds to choose one, then that one and the default with one to judge.
    assert len(confirmed) == 2 * 2 + 2 * 1
    assert any("changes" in event["config"] for event in confirmed)
    table = pd.read_csv(run.trials_csv).set_index("trial")
    assert table["changes"].notna()[2]
    text = summary(results)
    assert "Hyperparameter importance: not available with" in text
    assert "--trials" not in text  # a population keeps its size
    assert "not available with --scheduler pbt" in run.report_html.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            ["--trials=9"],
            "--trials: a population (pbt) keeps its size; this run started with 6, got 9.",
        ),
        (["--scheduler=asha"], "--scheduler: cannot switch to or from pbt"),
        (
            ["--scheduler=none", "--allow-changed-space"],
            "--scheduler: cannot switch to or from pbt",
        ),
    ],
)
def test_what_a_population_cannot_become(
    run: RunDir, changed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(run.path), *changed]) == 2
    assert said in capsys.readouterr().err


def test_changes_on_the_way_are_in_the_tables_and_the_pages(tmp_path: Path):
    run = write_run(tmp_path, trials=8)
    best = int(load(run).best["trial"])
    config = load(run).configs[best] | {"changes": [[20, "lr", 0.5], [20, "eps", 1e-6]]}
    change = {"trial": best, "of": 1, "config": config}
    run.append_event({"event": "population_changed", "step": 20, "changed": [change]})
    settings = yaml.safe_load(run.search_yaml.read_text())
    run.write_atomic(run.search_yaml, yaml.safe_dump({**settings, "scheduler": "pbt"}))

    results = write_tables(run)

    table = pd.read_csv(run.trials_csv).set_index("trial")
    assert json.loads(table["changes"][best]) == config["changes"]
    assert table["changes"].notna().sum() == 1
    trained = yaml.safe_load(run.best_yaml.read_text())["trial"]
    assert TrialConfig.from_dict(trained).at(20).lr == 0.5
    assert "  after step 20: lr 5e-1, eps 1e-6" in summary(results).splitlines()
    page = report_page(results)
    assert "<dt>after step 20</dt><dd>lr 5e-1, eps 1e-6</dd>" in page
    assert "after step 20: lr 5e-1, eps 1e-6" in comparison_page([results, results])
