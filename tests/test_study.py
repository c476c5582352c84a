"""The study and the events of a run agree again after a kill at any point between them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tune_app.report.results import load
from tune_app.run.event_log import append
from tune_app.run.run_dir import RunDir
from tune_app.run.run_state import RunState
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.study.storage import (
    check_study,
    missing_events,
    open_study,
    requeue_unfinished,
    study_name,
)

LAST = {"step": 20, "eval_loss": 1.5, "objective": 1.5, "accuracy": 0.4, "diverged": False}


def ask(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    trial.set_user_attr("origin", "suggested")
    trial.set_user_attr("config", TrialConfig(steps=20).to_dict())
    return trial


def finish(study: optuna.Study, trial: optuna.Trial, last: dict) -> None:
    trial.set_user_attr("report", last)
    study.tell(trial, last["objective"])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


@pytest.fixture
def study(run: RunDir) -> optuna.Study:
    return open_study(SearchConfig(), run, "tune_app")


def test_running_trials_are_asked_again_as_themselves(study: optuna.Study) -> None:
    lost = ask(study)
    requeue_unfinished(study)
    again = study.ask()

    assert again.number == lost.number
    assert again.suggest_float("lr", 1e-4, 1e-1, log=True) == lost.params["lr"]
    assert len(study.trials) == 1


def test_missing_events_end_what_the_study_knows_as_ended(run: RunDir, study: optuna.Study) -> None:
    finished, diverged, stopped, failed, running = (ask(study) for _ in range(5))
    finish(study, finished, LAST)
    finish(study, diverged, LAST | {"step": 4, "diverged": True, "objective": 9.0})
    stopped.set_user_attr("report", LAST | {"step": 8})
    study.tell(stopped, state=TrialState.PRUNED)
    study.tell(failed, state=TrialState.FAIL)

    for event in missing_events(study, RunState.read(run)):
        append(run, event)

    trials = load(run).trials.set_index("trial")
    assert dict(trials["status"]) == {0: "finished", 1: "diverged", 2: "stopped", 3: "failed"}
    assert trials.loc[0, "eval_loss"] == 1.5
    assert missing_events(study, RunState.read(run)) == []
    assert running.number not in trials.index


def test_events_cut_off_at_any_byte_still_open_and_are_completed(
    run: RunDir, study: optuna.Study
) -> None:
    trial = ask(study)
    finish(study, trial, LAST)
    run.append_event({"event": "search_started", "trials": 1, "study": "tune_app"})
    for event in missing_events(study, RunState()):
        append(run, event)
    whole = run.events_jsonl.read_bytes()

    for cut in range(0, len(whole), 17):
        run.events_jsonl.write_bytes(whole[:cut])
        for event in missing_events(study, RunState.read(run)):
            append(run, event)
        trials = load(run).trials
        assert list(trials["trial"]) == [0]
        assert list(trials["status"]) == ["finished"]
        assert list(trials["step"]) == [20]


def test_runs_on_one_storage_have_studies_of_their_own(tmp_path: Path) -> None:
    config = SearchConfig(storage=f"sqlite:///{tmp_path / 'shared.db'}")
    runs = [RunDir(tmp_path / name / "run").create() for name in "ab"]
    names = [study_name(config, run) for run in runs]
    studies = [open_study(config, run, name) for run, name in zip(runs, names, strict=True)]
    ask(studies[0])

    assert names[0] != names[1]
    assert [len(study.trials) for study in studies] == [1, 0]
    runs[0].append_event({"event": "search_started", "study": names[0]})
    assert study_name(config, runs[0]) == names[0]


def test_a_lost_study_is_refused(run: RunDir) -> None:
    run.append_event({"event": "trial_started", "trial": 0, "config": {}})

    with pytest.raises(ConfigError, match="does not contain this run's study"):
        open_study(SearchConfig(), run, "tune_app")


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/x.db", "nosuch://x"])
def test_a_storage_that_does_not_open_is_the_users_mistake(run: RunDir, url: str) -> None:
    with pytest.raises(ConfigError, match="--storage"):
        open_study(SearchConfig(storage=url), run, "x")


def test_a_copied_run_does_not_share_its_originals_study(tmp_path: Path) -> None:
    config = SearchConfig(storage=f"sqlite:///{tmp_path / 'shared.db'}")
    run = RunDir(tmp_path / "run").create()
    name = study_name(config, run)
    run.append_event({"event": "search_started", "study": name})
    ask(open_study(config, run, name))
    run.append_event({"event": "trial_started", "trial": 0, "config": {}})
    check_study(replace(config, out=run.path))
    shutil.copytree(run.path, tmp_path / "copy")

    with pytest.raises(ConfigError, match="is a copy"):
        check_study(replace(config, out=tmp_path / "copy"))

    run.path.rename(tmp_path / "moved")  # the same run in another place
    check_study(replace(config, out=tmp_path / "moved"))


# In processes that are forked once everything is imported, so that they begin at the same moment.
OPEN_AT_ONCE = """
import multiprocessing, sys
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.study.storage import open_study

url, *names = sys.argv[1:]
fork = multiprocessing.get_context("fork")
together = fork.Barrier(len(names))

def begin(name):
    together.wait()
    open_study(SearchConfig(storage=url), RunDir(name), name)

processes = [fork.Process(target=begin, args=(name,)) for name in names]
for process in processes:
    process.start()
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""


def test_commands_that_make_a_storage_at_the_same_time_all_open_it(tmp_path: Path) -> None:
    """Each creates its tables where there are none: all but one are refused at first."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    command = [sys.executable, "-c", OPEN_AT_ONCE, url, *"abcd"]

    opened = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert (opened.stdout, opened.stderr) == ("[0, 0, 0, 0]\n", "")
    assert sorted(optuna.get_all_study_names(url)) == ["a", "b", "c", "d"]
