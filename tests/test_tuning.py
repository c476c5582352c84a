"""Which trials the default scheduler stops, and what short trials cost, by Ray Tune's classes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from benchmarks.sample_efficiency import StubTrial
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import OBJECTIVE, deciding_steps, evaluation_steps
from tune_app.search.ray_tune import cluster, executor
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.study_trials import Stage
from tune_app.search.trial_job import JOB, TrialJob
from tune_app.serve.connection import Connection
from tune_app.study.pruners import build_pruner
from tune_app.study.yaml_space import load_space


def job(number: int) -> TrialJob:
    return TrialJob(number, TrialConfig(), Path("nowhere"))


def stopped_at(scheduler: TrialScheduler, step: int, losses: dict[int, float]) -> list[int]:
    """Numbers of the trials that end at that step, reporting in the order of `losses`."""
    ended = []
    for number, loss in losses.items():
        trial = StubTrial(job(number))
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
        assert stopped_at(scheduler, step, losses) == []
        for number, trial in trials.items():
            trial.report(losses[number], step)
        assert not any(trial.should_prune() for trial in trials.values())


def test_asha_keeps_the_better_half_at_three_fifths(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, WORSE_AND_WORSE) == [1, 2, 3, 4, 5, 6]
    # Now half of the trials are below 4.0.
    assert stopped_at(asha, 30, {7: 3.5, 8: 4.5}) == [8]


def test_asha_never_stops_the_documented_default(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, {1: 1.0, 2: 1.1, 3: 1.2, 0: 9.0}) == [2, 3]


class Ends(Callback):
    ended = 0

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        self.ended += 1


class Numbers(Searcher):
    """A job for each number; Tune asks for as many as it wants."""

    def __init__(self) -> None:
        super().__init__(OBJECTIVE, "min")
        self._numbers = itertools.count()

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {JOB: job(next(self._numbers))}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.slow
def test_trials_that_end_before_others_have_begun_cost_no_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quick(tune.Trainable):  # in here, or Ray's processes would have to import this file
        def setup(self, config: dict[str, Any]) -> None:
            time.sleep(2 * min(config[JOB].number, 1))  # only the first one begins at once

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            return {OBJECTIVE: 1.0, "done": True}

    tune.register_trainable("Quick", Quick)
    monkeypatch.setattr(executor, "register_trial", lambda hosts, connection: "Quick")
    config = SearchConfig()
    recorder = Ends()
    with cluster._ray(config):
        hosts = cluster.Cluster([], Connection(), {}, 0, "", lambda: None)
        trials = executor.RayTune(config, load_space("default"), RunDir(tmp_path), hosts)
        stage = Stage("search", count=30, at_once=4, scheduler="none", stopping=lambda: False)
        trials._tuner(stage, Numbers(), build_trial_scheduler("none", steps=1), recorder).fit()
        actors = ray._private.state.actors()
    assert recorder.ended == 30
    assert len(actors) <= 4  # of all, also of those that ended before they had begun
