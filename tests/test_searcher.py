"""What the study learns of a search, over a real Optuna storage; and Ray Tune's view of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import Report, outcome
from tune_app.search.ray_tune.searcher import StudySearcher
from tune_app.search.study_trials import StudyTrials
from tune_app.search.trial_job import JOB, REPORT, TrialJob
from tune_app.study.samplers import build_sampler
from tune_app.study.storage import open_study, requeue_unfinished
from tune_app.study.yaml_space import load_space

BASE = SearchConfig(steps=20).base_trial()


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(SearchConfig(), RunDir(tmp_path / "run"), "tune_app")


class Ending:
    """Whether the search ends, as the searcher asks it."""

    now = False

    def __call__(self) -> bool:
        return self.now


@pytest.fixture
def ending() -> Ending:
    return Ending()


@pytest.fixture
def searcher(study: optuna.Study, ending: Ending) -> StudySearcher:
    space = load_space("conditional")
    study.sampler = build_sampler("tpe", space, 0)
    trials = StudyTrials(study, space, BASE, RunDir("somewhere"), ending)
    return StudySearcher(trials, wait_if_ray_died=lambda: None)


def report(step: int, loss: float, **more: Any) -> Report:
    values = {"eval_loss": loss, "objective": loss, "metrics": {"accuracy": 0.4}, **more}
    return Report(step=step, **values)


def result(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A result as Ray Tune hands it on, with keys of its own."""
    told = report(step, loss, **more)
    return told.flat() | {REPORT: told, "pid": 7}


def test_the_first_trials_come_first_and_then_suggestions(
    study: optuna.Study, searcher: StudySearcher
) -> None:
    space = load_space("conditional")
    for first in space.first_trials(BASE):
        first.enqueue(study)

    jobs: list[TrialJob] = [searcher.suggest(f"id{i}")[JOB] for i in range(6)]

    assert [job.number for job in jobs] == [0, 1, 2, 3, 4, 5]
    assert [job.origin for job in jobs] == [
        "default",
        "default",
        "enqueued",
        "enqueued",
        "suggested",
        "suggested",
    ]
    assert (jobs[0].config.lr, jobs[0].config.scheduler) == (1e-3, "linear")
    assert (jobs[2].config.lr, jobs[2].config.scheduler) == (0.01, "constant")
    assert [job.checkpoint for job in jobs] == [RunDir("somewhere").checkpoint(n) for n in range(6)]
    assert [t.user_attrs["config"] for t in study.trials] == [job.config.to_dict() for job in jobs]


def test_nothing_is_suggested_when_the_search_ends(
    study: optuna.Study, searcher: StudySearcher, ending: Ending
) -> None:
    ending.now = True

    assert searcher.suggest("a") == Searcher.FINISHED
    assert study.trials == []


@pytest.mark.parametrize(
    ("last", "state", "value"),
    [
        (result(20, 1.2), TrialState.COMPLETE, 1.2),
        (result(8, 1.7), TrialState.PRUNED, 1.7),
        # Ten times its first loss: finite, and worse than any that trains.
        (
            result(4, float("nan"), objective=21.0, diverged=True),
            TrialState.COMPLETE,
            21.0,
        ),
    ],
)
def test_the_end_of_a_trial_is_told_with_its_curve(
    study: optuna.Study,
    searcher: StudySearcher,
    last: dict[str, Any],
    state: TrialState,
    value: float,
) -> None:
    searcher.suggest("a")
    for early in (result(2, 2.0), result(3, 1.9)):
        searcher.on_trial_result("a", early)
    if state == TrialState.COMPLETE:
        searcher.on_trial_result("a", last)
    searcher.on_trial_complete("a", last)

    told = study.trials[0]
    assert (told.state, told.value) == (state, value)
    assert list(told.intermediate_values) == [2, 3, last["step"]]
    assert told.user_attrs["report"]["objective"] == value
    assert "pid" not in told.user_attrs["report"]  # Ray's


def test_a_trial_that_the_end_of_the_search_cuts_off_goes_on_as_itself(
    study: optuna.Study, searcher: StudySearcher, ending: Ending
) -> None:
    job = searcher.suggest("a")[JOB]
    searcher.on_trial_result("a", result(4, 1.9))
    ending.now = True
    searcher.on_trial_complete("a", result(4, 1.9))
    assert study.trials[0].state == TrialState.RUNNING

    requeue_unfinished(study)
    ending.now = False
    again = searcher.suggest("b")[JOB]

    assert again == job
    searcher.on_trial_result("b", result(4, 1.9))  # from its checkpoint: once more, and no warning
    searcher.on_trial_result("b", result(20, 1.1))
    searcher.on_trial_complete("b", result(20, 1.1))
    assert [(t.state, t.value) for t in study.trials] == [(TrialState.COMPLETE, 1.1)]


def test_a_trial_that_finished_while_the_search_ended_is_told(
    study: optuna.Study, searcher: StudySearcher, ending: Ending
) -> None:
    searcher.suggest("a")
    ending.now = True
    searcher.on_trial_complete("a", result(20, 1.3))

    assert study.trials[0].value == 1.3


def test_a_failure_is_no_bad_config(study: optuna.Study, searcher: StudySearcher) -> None:
    """FAIL has no value and no sampler learns from it."""
    searcher.suggest("a")
    searcher.on_trial_result("a", result(4, 1.9))
    searcher.on_trial_complete("a", None, error=True)

    assert (study.trials[0].state, study.trials[0].value) == (TrialState.FAIL, None)


def test_a_trial_that_a_kill_left_without_its_config_is_begun_again(
    study: optuna.Study, searcher: StudySearcher
) -> None:
    lost = study.ask()  # the kill came between the question and the first parameter
    requeue_unfinished(study)

    job = searcher.suggest("a")[JOB]

    assert (job.number, job.origin) == (lost.number, "suggested")
    assert study.trials[0].user_attrs["config"] == job.config.to_dict()


def test_a_sampler_learns_from_a_divergence(study: optuna.Study, searcher: StudySearcher) -> None:
    """Where all large rates diverge, suggestions leave them."""
    for i in range(40):
        lr = searcher.suggest(str(i))[JOB].config.lr
        diverged = lr > 1e-3
        loss = 20.0 if diverged else 2.0 + abs(math.log10(lr) + 3.5)
        searcher.on_trial_complete(str(i), result(4 if diverged else 20, loss, diverged=diverged))

    rates = [trial.params["lr"] for trial in study.trials]
    assert sum(lr > 1e-3 for lr in rates[:8]) >= 2
    assert sum(lr > 1e-3 for lr in rates[-10:]) <= 4  # by chance 7


def test_outcome_names_each_end() -> None:
    assert outcome(report(20, 1.0), 20) == (Status.FINISHED, "")
    assert outcome(report(8, 1.0), 20)[0] == Status.STOPPED
    assert outcome(report(20, 1.0, diverged=True), 20)[0] == Status.DIVERGED
    assert outcome(None, 20)[0] == Status.STOPPED


def test_no_trial_is_blamed_for_the_death_of_ray(study: optuna.Study, ending: Ending) -> None:
    """Ray tells of its trials' failures before anybody has noticed that it has died itself."""

    class Ended(BaseException):
        pass

    def ray_has_died() -> None:
        raise Ended

    trials = StudyTrials(study, load_space("conditional"), BASE, RunDir("somewhere"), ending)
    searcher = StudySearcher(trials, ray_has_died)
    searcher.suggest("a")
    with pytest.raises(Ended):
        searcher.on_trial_complete("a", error=True)
    assert study.trials[0].state == TrialState.RUNNING  # asked again by a resumed search
    searcher.on_trial_complete("a", result(100, 1.5))  # one that ends needs no Ray
    assert study.trials[0].state == TrialState.COMPLETE
