"""What stands in the events: told by Ray Tune's callbacks, with Ray Tune's own trials."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial

from tune_app.run.event_log import EventLog
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import TrialConfig
from tune_app.run.trial_report import Report
from tune_app.search.ray_tune.callback import RecordsTrials
from tune_app.search.ray_tune.trainable import InfrastructureFailed, TrialFailed
from tune_app.search.recorder import Recorder
from tune_app.search.trial_job import JOB, REPORT, TrialJob, job_of

STEPS = 20


class Search:
    """A recorder, what it told, and the trials that Ray Tune tells it of."""

    def __init__(self, folder: Path) -> None:
        self.run, self.heard, self.ending = RunDir(folder / "run").create(), [], False
        log = EventLog(self.run, self.heard.append)
        self.recorder = Recorder(log, lambda: self.ending)
        self.callback = RecordsTrials(self.recorder, lambda: None)

    def trial(self, number: int, **more: Any) -> Trial:
        job = TrialJob(number, TrialConfig(steps=STEPS), self.run.checkpoint(number), **more)
        return Trial(
            "tune_app", stub=True, config={JOB: job}, trial_name_creator=lambda trial: job.name
        )

    def tell(self, name: str, trial: Trial, **more: Any) -> None:
        getattr(self.callback, f"on_trial_{name}")(iteration=0, trials=[trial], trial=trial, **more)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in event.items() if k != "time"} for event in self.run.events()]


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


def report(step: int, *, diverged: bool = False) -> Report:
    return Report(step=step, eval_loss=1.5, objective=1.5, learning_rate=1e-3, diverged=diverged)


def result(step: int, *, diverged: bool = False) -> dict[str, Any]:
    """A result as Ray Tune hands it on, with keys of its own."""
    told = report(step, diverged=diverged)
    return told.flat() | {REPORT: told, "pid": 7, "trial_id": "x"}


def test_a_trial_from_its_start_to_its_end(search: Search) -> None:
    trial = search.trial(3)
    search.tell("start", trial)
    search.tell("result", trial, result=result(4))
    trial.update_last_result(result(STEPS))
    search.tell("result", trial, result=result(STEPS))
    search.tell("complete", trial)

    kinds = [(event["event"], event["trial"]) for event in search.events]
    assert kinds == [("trial_started", 3), ("report", 3), ("report", 3), ("trial_ended", 3)]
    assert search.events[0]["config"] == job_of(trial.config).config.to_dict()
    assert search.events[1] == {"event": "report", "trial": 3, "train_loss": None} | {
        k: v for k, v in report(4).flat().items() if k != "train_loss"
    }  # nothing of Ray's
    assert search.events[3]["status"] == "finished"
    assert [event.kind for event in search.heard] == [event for event, _ in kinds]


def test_a_confirmation_run_says_what_it_repeats(search: Search) -> None:
    search.tell("start", search.trial(100_301, origin="confirm", of=3))

    assert (search.events[0]["origin"], search.events[0]["of"]) == ("confirm", 3)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (result(STEPS), "finished"),
        (result(8), "stopped"),
        (result(4, diverged=True), "diverged"),
    ],
)
def test_how_a_trial_ended(search: Search, last: dict[str, Any], status: str) -> None:
    trial = search.trial(1)
    trial.update_last_result(last)
    search.tell("complete", trial)

    assert search.events[0]["status"] == status


def test_a_trial_that_the_end_of_the_search_cuts_off_has_not_ended(search: Search) -> None:
    search.ending = True
    cut, finished = search.trial(1), search.trial(2)
    cut.update_last_result(result(8))
    finished.update_last_result(result(STEPS))
    search.tell("complete", cut)
    search.tell("complete", finished)

    assert [event["trial"] for event in search.events] == [2]


def test_started_again_after_a_failure_it_is_the_same_trial(search: Search) -> None:
    trial = search.trial(1)
    search.tell("start", trial)
    search.tell("start", trial)

    assert len(search.events) == 1


@pytest.mark.parametrize(
    ("error", "reason", "machines"),
    [
        (InfrastructureFailed("the trial host died"), "the trial host died", True),
        (RayActorError(), "the process of the trial died", True),
        (
            TrialFailed("Traceback ...\nValueError: no such label"),
            "ValueError: no such label",
            False,
        ),
    ],
)
def test_whose_fault_a_failure_is(
    search: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
    machines: bool,
) -> None:
    trial = search.trial(1)
    file = tmp_path / "error.pkl"
    if not isinstance(error, RayActorError):  # an error of the trainable comes wrapped
        error = RayTaskError("train", str(error), error)
    file.write_bytes(pickle.dumps(error))
    monkeypatch.setattr(Trial, "pickled_error_file", str(file))

    search.tell("recover", trial)
    search.tell("error", trial)

    retried, ended = search.events
    assert (retried["reason"], retried["machines"]) == (reason, machines)
    assert (ended["status"], ended["reason"]) == ("failed", reason)


def test_ray_tune_may_pickle_it_with_its_listener(search: Search) -> None:
    """Tune saves its callbacks; the listener holds a terminal and locks."""
    assert pickle.loads(pickle.dumps(search.callback)) is not None
