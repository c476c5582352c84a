"""Which trials the default scheduler stops, and what short trials cost, by Ray Tune's classes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from benchmarks.sample_efficiency import StubTrial
from tune_app.run.event_log import EventLog
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import OBJECTIVE, deciding_steps, evaluation_steps
from tune_app.search.ray_tune import cluster, executor, internals
from tune_app.search.ray_tune.callback import RecordsTrials
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.ray_tune.trainable import TrialActor
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Stage
from tune_app.search.trial_job import JOB, TrialJob, job_of
from tune_app.serve.connection import Connection
from tune_app.study.pruners import build_pruner
from tune_app.study.yaml_space import load_space


def job(number: int, steps: int = 50) -> TrialJob:
    return TrialJob(number, TrialConfig(steps=steps), Path("nowhere"))


def stopped_at(
    scheduler: TrialScheduler, step: int, losses: dict[int, float], steps: int = 50
) -> list[int]:
    """Numbers of the trials of so many steps that end at that step, reporting in the order of
    `losses`."""
    ended = []
    for number, loss in losses.items():
        trial = StubTrial(job(number, steps))
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {OBJECTIVE: loss, "step": step})
        if decision == TrialScheduler.STOP:
            ended.append(number)
    return ended


@pytest.fixture
def asha() -> TrialScheduler:
    scheduler = build_trial_scheduler("asha", steps=50)
    scheduler.set_search_properties(OBJECTIVE, "min")
    return scheduler


WORSE_AND_WORSE = {number: 1.0 + number for number in range(7)}


@pytest.mark.parametrize("step", [10, 20])
def test_asha_judges_nobody_before_three_fifths(asha: TrialScheduler, step: int) -> None:
    assert stopped_at(asha, step, WORSE_AND_WORSE) == []


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 60, 99])
def test_asha_and_its_pruner_look_at_deciding_evaluations_alone(steps: int) -> None:
    scheduler = build_trial_scheduler("asha", steps)
    scheduler.set_search_properties(OBJECTIVE, "min")
    study = optuna.create_study(pruner=build_pruner("asha", steps))
    trials = {number: study.ask() for number in WORSE_AND_WORSE}
    deciding = deciding_steps("asha", steps)
    for step in evaluation_steps(steps):
        alike = dict.fromkeys(WORSE_AND_WORSE, 1.0)
        losses = alike if step in deciding else WORSE_AND_WORSE
        assert stopped_at(scheduler, step, losses, steps) == []
        for number, trial in trials.items():
            trial.report(losses[number], step)
        assert not any(trial.should_prune() for trial in trials.values())


def test_asha_ends_the_worst_quarter_at_three_fifths(asha: TrialScheduler) -> None:
    # The first four are only known; the fifth and those after it are worse than all before.
    assert stopped_at(asha, 30, WORSE_AND_WORSE) == [4, 5, 6]
    # Now a quarter of the trials are above 5.5, and with the next one above 5.55.
    assert stopped_at(asha, 30, {7: 5.4, 8: 5.6, 9: 1.0}) == [8]
    assert stopped_at(asha, 40, {7: 99.0, 9: 99.0}) == []  # no second rung
    assert stopped_at(asha, 50, {7: 99.0, 9: 99.0}) == []


def test_asha_judges_trials_of_any_length_after_the_same_share(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, WORSE_AND_WORSE) == [4, 5, 6]
    assert stopped_at(asha, 24, {7: 9.0, 8: 1.0}, steps=40) == [7]
    assert stopped_at(asha, 40, {9: 9.0}, steps=80) == []  # before its rung
    assert stopped_at(asha, 48, {9: 9.0}, steps=80) == [9]


def test_asha_never_stops_the_documented_default(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3, 0: 9.0, 5: 9.1}) == [5]


@given(st.lists(st.floats(-10, 10, width=16), min_size=5, max_size=30))
@settings(max_examples=30, deadline=None)
def test_a_pruner_does_what_tunes_asha_does(losses: list[float]) -> None:
    """Also where losses are alike."""
    scheduler = build_trial_scheduler("asha", steps=50)
    scheduler.set_search_properties(OBJECTIVE, "min")
    study = optuna.create_study(pruner=build_pruner("asha", 50))
    for number, loss in enumerate(losses, 1):
        trial = study.ask()
        steps = 50 if number % 3 else 80
        if steps != 50:
            trial.set_user_attr("config", TrialConfig(steps=steps).to_dict())
        for step in (10, 30, 48):
            trial.report(loss, step)
            ended = stopped_at(scheduler, step, {number: loss}, steps)
            assert [number] * trial.should_prune() == ended
        study.tell(trial, loss)


def test_what_tune_has_of_a_trial_goes_with_its_end(tmp_path: Path) -> None:
    trial = ray.tune.experiment.Trial("any", config={JOB: job(0)}, stub=True)
    shown = {OBJECTIVE: 1.0, "training_iteration": 1}
    trial.update_last_result({**shown, "learning_rate": 1e-3, "accuracy": 0.5})
    assert trial.metric_n_steps
    assert "_default_result_or_future" in vars(trial)  # Ray's name for what is dropped
    recorder = Recorder(EventLog(RunDir(tmp_path)), lambda: False)

    RecordsTrials(recorder, lambda: None).on_trial_complete(1, [trial], trial)

    assert trial.metric_n_steps == trial.metric_analysis == {}
    assert trial.last_result.items() <= {**shown, "trial_id": trial.trial_id}.items()
    assert trial.last_result.items() >= shown.items()  # for Tune's table


def test_all_trials_share_what_tune_keeps_with_each() -> None:
    first, second = (TrialActor.default_resource_request({JOB: job(n)}) for n in (0, 1))
    assert first is second


class Seen(Callback):
    """Numbers of the trials that ended, that were retried, that failed."""

    def __init__(self) -> None:
        self.ended, self.retried, self.failed = list[int](), list[int](), list[int]()

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
        self.ended.append(job_of(trial.config).number)

    def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
        self.retried.append(job_of(trial.config).number)

    def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
        self.failed.append(job_of(trial.config).number)


class Numbers(Searcher):
    """A job for each number."""

    def __init__(self, count: int) -> None:
        super().__init__(OBJECTIVE, "min")
        self._numbers = iter(range(count))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        number = next(self._numbers, None)
        return str(Searcher.FINISHED) if number is None else {JOB: job(number)}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture(scope="module")
def a_ray() -> Iterator[None]:
    with cluster._ray(SearchConfig()):
        yield


def run_all(
    trainable: type[tune.Trainable], run: Path, patch: pytest.MonkeyPatch, count: int, at_once: int
) -> Seen:
    """As a search would, on the trainable in place of its own."""
    tune.register_trainable(trainable.__name__, trainable)
    patch.setattr(executor, "register_trial", lambda hosts, connection: trainable.__name__)
    hosts = cluster.Cluster([], Connection(), {}, 0, "", lambda: None)
    trials = executor.RayTune(SearchConfig(), load_space("default"), RunDir(run), hosts)
    stage = Stage("search", count, at_once, scheduler="none", stopping=lambda: False)
    seen = Seen()
    trials._tuner(stage, Numbers(count), build_trial_scheduler("none", steps=1), seen).fit()
    return seen


@pytest.mark.slow
def test_trials_that_end_before_others_have_begun_cost_no_processes(
    a_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quick(tune.Trainable):  # in here, or Ray's processes would have to import this file
        def setup(self, config: dict[str, Any]) -> None:
            time.sleep(2 * min(config[JOB].number, 1))  # only the first one begins at once

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            return {OBJECTIVE: 1.0, "done": True}

    before = len(ray._private.state.actors())
    seen = run_all(Quick, tmp_path, monkeypatch, count=30, at_once=4)
    assert len(seen.ended) == 30
    assert (
        0 < len(ray._private.state.actors()) - before <= 4
    )  # of all, also of those that ended before they had begun


@pytest.mark.slow
def test_a_trial_whose_process_dies_before_it_begins_is_retried(
    a_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = tmp_path / "once"

    class Mortal(tune.Trainable):  # in here, as above
        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if new_config[JOB].number == 1 and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return True

        def step(self) -> dict[str, Any]:
            return {OBJECTIVE: 1.0, "done": True}

    with internals.retried_if_actor_dies_between_trials():
        seen = run_all(Mortal, tmp_path, monkeypatch, count=3, at_once=1)
    assert once.exists()
    assert (seen.retried, seen.failed, sorted(seen.ended)) == ([1], [], [0, 1, 2])
