"""Runs that an earlier version made: they open, report and resume.

tests/data/former-run: 5 trials, killed while trial 3 had a step to go and trial 4 had begun.
tests/data/former-population: events of `--scheduler pbt`, to its end.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
from test_host import updates_of

from tune_app.models.folder import model_folder
from tune_app.report.results import load
from tune_app.report.write import write_all
from tune_app.run.event_log import read
from tune_app.run.events import OtherEvent, event_from_json
from tune_app.run.flags import parse_search_args
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.run_state import RunState
from tune_app.run.search_config import SearchConfig
from tune_app.search.checks import judged_otherwise
from tune_app.search.host import TrialHost
from tune_app.search.study_trials import StudyTrials
from tune_app.serve.connection import Connection
from tune_app.study.storage import missing_events, open_study, requeue_unfinished
from tune_app.study.yaml_space import load_space

DATA = Path(__file__).parent / "data"


def copy_of(name: str, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(DATA / name, folder / name))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return copy_of("former-run", tmp_path)


@pytest.fixture
def population(tmp_path: Path) -> RunDir:
    return copy_of("former-population", tmp_path)


@pytest.mark.parametrize("name", ["former-run", "former-population"])
def test_its_events_are_written_again_as_they_were(name: str) -> None:
    for line in (DATA / name / "events.jsonl").read_text().splitlines():
        before = json.loads(line)
        event = event_from_json(before)
        after = json.loads(json.dumps(event.to_json()))
        assert not isinstance(event, OtherEvent)
        # Hyperparameters that were not known then have their defaults.
        for here, there in zip(configs_in(after), configs_in(before), strict=True):
            assert there.items() <= here.items()
            here.clear(), there.clear()
        extra = {"data", "study"} - before.keys()  # not known then, or not of this kind
        assert {k: v for k, v in after.items() if k not in extra} == before


def configs_in(event: dict) -> list[dict]:
    return (
        [event["config"]] if "config" in event else [c["config"] for c in event.get("changed", ())]
    )


def test_it_opens_with_every_trial_as_it_was_left(run: RunDir) -> None:
    results = load(run)
    trials = results.trials.set_index("trial")

    assert dict(trials["status"]) == {
        0: Status.FINISHED,
        2: Status.FINISHED,
        1: Status.FINISHED,
        3: Status.INTERRUPTED,
        4: Status.INTERRUPTED,
    }
    assert trials.loc[0, "eval_loss"] == 2.026156425476074
    assert (trials.loc[3, "step"], trials.loc[3, "scheduler"]) == (16, "cosine")
    assert math.isnan(trials.loc[4, "eval_loss"])
    assert set(trials["init"]) == {"normal"}  # as all prompts began then
    assert len(results.history) == 19
    assert results.seconds == pytest.approx(108, abs=1)


def test_it_keeps_its_sampler(run: RunDir) -> None:
    assert parse_search_args(["--resume", str(run.path)]).sampler == "tpe"
    assert SearchConfig().sampler == "gp"


def test_its_tables_and_page_are_made_anew(run: RunDir) -> None:
    text = write_all(run)

    assert f"--resume {run.path}" in text
    assert pd.read_csv(run.trials_csv)["trial"].tolist() == [0, 2, 1, 3, 4]
    assert len(pd.read_csv(run.history_csv)) == 19
    assert run.report_html.stat().st_size > 100_000
    assert run.best_yaml.read_text().startswith("# Trial 0 of former-run")


def test_a_population_has_its_changes_and_its_confirmation(population: RunDir) -> None:
    write_all(population)
    results = load(population)
    state = RunState.read(population)

    assert [event.step for event in state.rounds] == [2, 4, 6, 8]
    assert results.changes(1) == [[4, "lr", 0.0012], [4, "weight_decay", 0.001]]
    confirmed = [state.trials[100_200 + seed] for seed in (1, 2)]
    assert [trial.of for trial in confirmed] == [2, 2]
    assert replace(confirmed[0].config, seed=0) == state.trials[2].config
    assert list(results.confirm["trial"]) == [2, 0]


def test_it_is_known_to_have_judged_on_other_rows(run: RunDir, tmp_path: Path) -> None:
    assert judged_otherwise(run)
    assert not judged_otherwise(RunDir(tmp_path / "new"))


def test_its_unfinished_trials_are_asked_again_and_train_on(run: RunDir) -> None:
    config = SearchConfig.from_yaml(run.search_yaml)
    study = open_study(config, run, "tune_app")
    assert missing_events(study, RunState.read(run)) == []
    requeue_unfinished(study)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    space = load_space(str(run.space_yaml))
    trials = StudyTrials(study, space, config.base_trial(), run, stop=lambda: False)
    third, fourth = trials.ask(), trials.ask()
    started = RunState.read(run).trials
    # As it stands: former versions kept a warmup that is longer than the trial.
    assert [(n, started[n].config) for n in (3, 4)] == [
        (j.number, j.config) for j in (third, fourth)
    ]

    host = TrialHost("host-0", config, str(model_folder("demo")), threads=1)
    host.connect(Connection())

    async def train() -> list:
        await host.start(third, Connection())
        return await updates_of(host, third.number)

    first, last, _ = asyncio.run(train())
    host.close()
    told = [e.report for e in read(run) if e.kind == "report" and e.trial == 3][-1]
    assert first.report == told  # the last report before the kill, once more
    assert last.report.step == 20
    assert last.report.tokens > told.tokens
    trials.end(3, last.report)
    assert study.trials[3].state == optuna.trial.TrialState.COMPLETE
