"""Real searches that meet what goes wrong or is used up: divergence, budgets, a swarm that dies."""

from __future__ import annotations

from pathlib import Path

import optuna
import pandas as pd
import pytest

from benchmarks.kill_and_resume import Search, check_nothing_is_lost, ended, events, reports
from benchmarks.kill_tree import kill_each
from benchmarks.relay import free_port
from tune_app.models.folder import model_folder
from tune_app.run.run_dir import RunDir
from tune_app.search.cli import main
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = ["--steps", "10", "--batch-size", "2", "--confirm", "0", "--concurrency", "2"]
SMALL += ["--eval-rows", "16"]
IN_PROCESS = ["--executor=in-process", "--backbone=local", "--quiet"]
SPACE = """
parameters: {lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e+9}}
enqueue: [{lr: 1.0e+9}]
"""


def finish(search: Search, exit_code: int = 0) -> None:
    code, said = search.wait(), search.process.stderr.read()
    assert code == exit_code, said
    assert "Traceback" not in said


def states(run: Path) -> list[str]:
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
    return [trial.state.name for trial in study.trials]


def test_a_diverged_trial_ends_early_and_the_sampler_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "space.yaml").write_text(SPACE)
    huge = ["--scheduler=none", f"--space={tmp_path / 'space.yaml'}"]
    assert main([*SMALL, *IN_PROCESS, *huge, "--trials=3", f"--out={run}"]) == 0

    table = pd.read_csv(run / "trials.csv").set_index("trial")
    default, huge = table.loc[0], table.loc[2]  # 1 is the default with a shorter warmup
    assert default["status"] == "finished"
    assert (huge["status"], huge["lr"]) == ("diverged", 1e9)
    assert huge["step"] < 10
    assert huge["objective"] > 2 * default["eval_loss"]
    study = optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run / 'study.db'}")
    told = study.trials[2]
    assert (told.state.name, told.params["lr"], told.value) == ("COMPLETE", 1e9, huge["objective"])
    check_nothing_is_lost(run, 3)


def test_budgets_end_a_search_with_results_and_leave_the_rest_for_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*SMALL, *IN_PROCESS, "--trials=100", "--token-budget=2k", f"--out={run}"]) == 0

    table = pd.read_csv(run / "trials.csv")
    assert 2000 <= table["tokens"].sum() < 4000
    last = events(run)[-1]
    assert (last["event"], last["reason"]) == ("search_ended", "the token budget is spent")
    assert "the token budget is spent" in (run / "summary.txt").read_text()
    assert "RUNNING" not in states(run)
    before, spent = ended(run), reports(run)

    more = ("--trials=1000", "--token-budget=1M", "--time-budget=4s", "--executor=ray")
    resumed = Search("--resume", str(run), *more)
    finish(resumed)

    assert events(run)[-1]["reason"] == "the time budget is spent"
    assert reports(run) > spent
    assert before <= ended(run)
    assert len(ended(run)) < 1000
    assert "RUNNING" not in states(run)
    again = [event["trial"] for event in events(run) if event["event"] == "trial_ended"]
    assert len(again) == len(set(again))


@pytest.mark.swarm
def test_a_swarm_that_is_gone_ends_the_search_and_is_no_bad_config(tmp_path: Path) -> None:
    run = tmp_path / "run"
    serving = ServeConfig(model_folder("demo"), port=free_port(), identity=tmp_path / "key")
    with private_swarm(serving) as swarm:
        given = ["--backbone=swarm", "--trials=3", "--scheduler=none", f"--out={run}"]
        search = Search(*SMALL, *given, "--peers", *swarm.peers)
        assert search.wait_until(lambda: reports(run) >= 2)
    code, said = search.wait(), search.process.stderr.read()

    assert code == 1, said
    assert f"--resume {RunDir(run).path}" in said
    assert "no server has answered for blocks 0:4 since" in (run / "events.jsonl").read_text()
    kinds = [event["event"] for event in events(run)]
    assert 0 < kinds.count("trial_retried") <= 2 * 3
    assert not set(states(run)) & {"FAIL", "RUNNING", "PRUNED"}

    with private_swarm(serving):  # its address is the same again
        finish(Search("--backbone=swarm", "--executor=in-process", "--resume", str(run)))
    check_nothing_is_lost(run, 3)
    assert states(run) == ["COMPLETE"] * 3


@pytest.mark.swarm
def test_a_search_outlives_its_server_and_its_trial_host(tmp_path: Path) -> None:
    kill_each(tmp_path / "run", ["server", "host"], print)
