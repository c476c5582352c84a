"""--mlflow against a real local server, --wandb offline, and what is said where neither works."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import lines_of
from shell import background, shell

import tune_app
from benchmarks.relay import free_port
from tune_app.run.events import TrialEnded, TrialReported, TrialStarted
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.run.trial_report import Report
from tune_app.search.checks import check_everything
from tune_app.search.tracking import _Follower, trackers
from tune_app.search.trial_job import trial_name

PROJECT = "prompt-tuning"
SEARCH = "python -m tune_app.search"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the MLflow server that the page's line starts, with a store of its own."""
    (line,) = lines_of("mlflow server")
    line = line.replace("--port 5000", f"--port {free_port()} --workers 1")
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    ready = r"Uvicorn running on (http://\S+)"
    with background(line, tmp_path_factory.mktemp("mlflow"), ready, quiet) as started:
        yield started[1]


@pytest.fixture(scope="module")
def run(server: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A real search that tells both of them, the page's two lines in one; its trials share two
    hosts."""
    folder = tmp_path_factory.mktemp("search")
    (offline,) = lines_of("export WANDB_MODE=offline")
    (line,), (more,) = lines_of(f"{SEARCH} --mlflow"), lines_of(f"{SEARCH} --wandb")
    line = line.replace("http://127.0.0.1:5000", server) + more.removeprefix(SEARCH)
    small = "--backbone local --trials 3 --steps 20 --confirm 1 --confirm-seeds 1 --quiet --hosts 2"
    said = shell(f"{offline}\n{line} {small}", folder)
    assert f"{server}, experiment first" in said
    return RunDir(folder / "runs" / "first")


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A search without Ray, with W&B."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run = tune_app.run_search(
            executor="in-process",
            backbone="local",
            wandb=PROJECT,
            trials=2,
            steps=2,
            batch_size=2,
            eval_rows=8,
            confirm=0,
            scheduler="none",
            out=tmp_path_factory.mktemp("in-process") / "run",
        )
    return RunDir(run.path)


def reports(run: RunDir, trial: int) -> list[dict[str, Any]]:
    return [e for e in run.events() if e["event"] == "report" and e["trial"] == trial]


def losses(run: RunDir, trial: int) -> dict[int, float]:
    return {event["step"]: event["eval_loss"] for event in reports(run, trial)}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_mlflow_server_has_every_trial_with_its_curve(server: str, run: RunDir) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("first")
    logged = {
        int(each.data.params["trial"]): each
        for each in client.search_runs([experiment.experiment_id])
    }
    started = {e["trial"]: e for e in run.events() if e["event"] == "trial_started"}

    assert logged.keys() == started.keys()
    assert len(logged) == 5  # three of the search, two of the confirmation
    for trial, each in logged.items():
        config = {k: str(v) for k, v in started[trial]["config"].items() if v is not None}
        assert config.items() <= each.data.params.items()
        assert each.data.params["origin"] == started[trial]["origin"]
        assert each.info.status == "FINISHED"
        curve = client.get_metric_history(each.info.run_id, "eval_loss")
        assert {point.step: point.value for point in curve} == pytest.approx(losses(run, trial))
        # Only what the trial has reported: none of Ray's counters, no path of this machine.
        assert each.data.metrics.keys() - {"training_iteration"} <= reports(run, trial)[-1].keys()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_both_hosts_have_trained(run: RunDir) -> None:
    hosts = run.events()[-1]["hosts"]
    assert [host["host"] for host in hosts] == ["host-0", "host-1"]
    assert all(host["rows"] > 0 for host in hosts)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wandb_has_every_trial_with_its_curve_offline(run: RunDir) -> None:
    (sync,) = lines_of("wandb sync")  # takes the folders that the search has left
    check_wandb(run, run.path.parents[1].glob(f"{sync.split()[-1]}/*.wandb"))


def test_wandb_follows_a_search_without_ray(in_process: RunDir) -> None:
    check_wandb(in_process, in_process.path.glob("wandb/offline-run-*/*.wandb"))


def check_wandb(run: RunDir, files: Iterator[Path]) -> None:
    found = {}
    for file in files:
        records = list(wandb_records(file))
        begun = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        found[begun.display_name] = (begun, records)
    trials = {e["trial"] for e in run.events() if e["event"] == "trial_started"}
    assert found.keys() == {trial_name(trial) for trial in trials}
    for trial in trials:
        begun, records = found[trial_name(trial)]
        rows = [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in records
            if r.WhichOneof("record_type") == "history"
        ]
        config = {item.key: item.value_json for item in begun.config.update}

        assert (begun.project, begun.run_group) == (PROJECT, run.path.name)
        assert json.loads(config["scheduler"]) in ("linear", "cosine", "constant_with_warmup")
        assert {row["_step"]: row["eval_loss"] for row in rows} == losses(run, trial)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of W&B's own file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's last bytes hold no record
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def refused(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_everything(SearchConfig(backbone="local", **settings))
    return error.value.messages


def test_missing_packages_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("mlflow", "wandb") else found(name, *rest),
    )

    messages = refused(mlflow="http://127.0.0.1:5000", wandb=PROJECT, trials=0)

    assert "pip install mlflow-skinny" in next(m for m in messages if m.startswith("--mlflow: "))
    assert "pip install wandb" in next(m for m in messages if m.startswith("--wandb: "))
    assert any(message.startswith("--trials: ") for message in messages)


def test_an_mlflow_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    (message,) = refused(mlflow="http://127.0.0.1:9")  # nobody listens there

    assert message.startswith("--mlflow: no answer from 'http://127.0.0.1:9': ")


def test_wandb_without_an_account_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where an account would be remembered
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    (message,) = refused(wandb=PROJECT)

    assert "wandb login" in message
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_everything(SearchConfig(backbone="local", wandb=PROJECT))


def test_a_server_that_dies_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    config = SearchConfig(mlflow="http://127.0.0.1:9")
    with trackers(config, RunDir(tmp_path), said.append) as (listen,):
        listen(TrialStarted(trial=3, config=TrialConfig(lr=0.1)))
        listen(TrialReported(trial=3, report=Report(step=4, eval_loss=2.0)))
        listen(TrialEnded(trial=3, status=Status.FINISHED))

    assert len(said) == 1
    assert said[0].startswith("MLflow failed; the search continues without it: ")


def test_trials_that_nobody_ended_are_told_as_interrupted() -> None:
    """And what has not begun in this command is not reported: it has no run there."""
    heard: list[tuple[Any, ...]] = []

    class Listening:
        name = "a tracker"

        def started(self, trial: int, parameters: dict[str, Any]) -> None:
            heard.append(("started", trial, parameters["lr"], "power" in parameters))

        def reported(self, trial: int, report: Report) -> None:
            heard.append(("reported", trial, report.step))

        def ended(self, trial: int, status: Status) -> None:
            heard.append(("ended", trial, status))

    follower = _Follower("a tracker", Listening, print)
    follower.listen(TrialReported(trial=1, report=Report(step=8)))
    follower.listen(TrialStarted(trial=2, config=TrialConfig(lr=0.1)))
    follower.listen(TrialReported(trial=2, report=Report(step=4)))
    follower.close()

    assert heard == [
        ("started", 2, 0.1, False),
        ("reported", 2, 4),
        ("ended", 2, Status.INTERRUPTED),
    ]
