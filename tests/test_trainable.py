"""The trial's actor: light, and all that Ray Tune expects of one."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.execution import tune_controller
from ray.tune.experiment import trial as tune_trial

from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report
from tune_app.search.ray_tune import trainable
from tune_app.search.ray_tune.trainable import TrialActor
from tune_app.search.trial_job import JOB, REPORT, TrialJob

# What Tune asks of a trainable's actor and this one has no use for: it writes no checkpoints of
# Tune's, exports nothing, and its reports are too few to be buffered.
UNUSED = {"save", "restore", "export_model", "train_buffered"}
FIRST = Report(step=4, eval_loss=2.0)


@pytest.fixture
def trial(tmp_path: Path) -> TrialActor:
    return TrialActor({JOB: TrialJob(3, TrialConfig(steps=8), tmp_path)})


def called_by_tune() -> set[str]:
    """Names of the methods that Tune's controller calls on a trainable's actor."""
    source = inspect.getsource(tune_controller) + inspect.getsource(tune_trial)
    scheduled = set(re.findall(r'method_name ?= ?"(\w+)"', source))
    return scheduled | {"stop"} | set(re.findall(r"ray_actor\.(\w+)\.remote", source))


def test_the_actor_answers_all_that_tune_calls() -> None:
    names = called_by_tune() - UNUSED
    assert {"train", "reset", "stop", "get_auto_filled_metrics"} <= names
    for name in names | {"default_resource_request"}:
        ours = inspect.signature(getattr(TrialActor, name)).parameters
        for parameter in inspect.signature(getattr(tune.Trainable, name)).parameters.values():
            if parameter.default is parameter.empty or parameter.name in ("storage",):
                assert parameter.name in ours, f"{name} lacks {parameter.name}"


def test_a_report_has_what_tunes_own_trainable_adds(trial: TrialActor) -> None:
    class Reference(tune.Trainable):
        def step(self) -> dict[str, object]:
            return FIRST.flat() | {REPORT: FIRST, "timesteps_total": FIRST.step}

    theirs = Reference({"job": {}}).train()
    ours = trial._result(FIRST)

    # About restoring, which this one never does; trial_id is filled in by Tune's controller.
    restoring = {name for name in theirs if "since_restore" in name} | {"trial_id"}
    assert set(ours) == set(theirs) - restoring
    assert {name: type(ours[name]) for name in ours} == {name: type(theirs[name]) for name in ours}
    assert ours["training_iteration"] == theirs["training_iteration"] == 1


@pytest.mark.parametrize(
    ("report", "done"),
    [
        (Report(step=4), False),
        (Report(step=8), True),
        (Report(step=4, diverged=True), True),
    ],
)
def test_the_last_report_ends_the_trial(trial: TrialActor, report: Report, done: bool) -> None:
    assert trial._result(report)["done"] is done


def test_a_reused_actor_is_another_trial_under_its_first_name(trial: TrialActor) -> None:
    assert trial.reset({JOB: replace(trial._job, number=7)})

    assert trial._job.number == 7
    assert trial._result(FIRST)["training_iteration"] == 1
    assert repr(trial) == "trial-003 and later"


ACTOR = """
import json, sys
from pathlib import Path
import ray
from tune_app.run.trial_config import TrialConfig
from tune_app.search.trial_job import JOB, TrialJob
from tune_app.search.ray_tune.trainable import TrialActor, register_trial
from tune_app.serve.connection import Connection
import ray.tune
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.experiment.trial import _TrialInfo
from ray.tune.experiment import Trial as TuneTrial
from ray.train._internal.storage import StorageContext

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR")
name = register_trial([], Connection())
cls = ray.tune.registry.get_trainable_cls(name)
storage = StorageContext(sys.argv[1], "search", trial_dir_name="trial-000")
config = {JOB: TrialJob(3, TrialConfig(steps=8), Path(sys.argv[1]))}
tune_trial = TuneTrial(name, config=config, storage=storage)
config = tune_trial.config | {"trial_info": _TrialInfo(tune_trial)}
actor = _ActorClassCache().get(cls).options(num_cpus=0).remote(config, storage=storage)
loaded, name, environment = ray.get(actor.__ray_call__.remote(
    lambda self: (
        sorted(__import__("sys").modules), repr(self),
        __import__("ray").get_runtime_context().runtime_env,
    )
))
print(json.dumps([loaded, name, dict(environment)]))
"""


@pytest.mark.slow
def test_its_process_loads_neither_torch_nor_tune(tmp_path: Path) -> None:
    """As Tune starts it: with its own class cache, storage and trial info."""
    output = subprocess.run(
        [sys.executable, "-c", ACTOR, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    ).stdout
    loaded, name, environment = json.loads(output.splitlines()[-1])

    assert "tune_app.search.ray_tune.trainable" in loaded
    assert {"torch", "pandas", "ray.tune", "ray.train", "ray.data"}.isdisjoint(loaded)
    assert name == "trial-003 and later"
    assert not environment  # one of its own would cost a process of its own


def test_trials_that_begin_at_once_go_to_the_hosts_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them sees the others: each finds that all hosts are as empty."""
    hosts = tuple(SimpleNamespace(load=SimpleNamespace(remote=lambda n=n: n)) for n in (3, 1, 1, 1))
    monkeypatch.setattr(trainable.ray, "get", lambda load, timeout: load)
    chosen = [hosts.index(trainable._least_loaded(hosts, trial)) for trial in range(8)]
    assert chosen == [1, 1, 2, 3, 1, 1, 2, 3]
