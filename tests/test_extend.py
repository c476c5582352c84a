"""Runs that are extended after their end, or share a storage: what stays, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest

from benchmarks.kill_and_resume import check_nothing_is_lost, ended, events
from tests.trained import flags
from tune_app.report.results import load
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search.checks import check_same_data
from tune_app.search.cli import main
from tune_app.train import cli as train

SMALL = ["--steps=6", "--batch-size=2", "--eval-rows=24", "--confirm=0", "--scheduler=none"]
SMALL += ["--backbone=local", "--executor=in-process", "--quiet"]
SPACE = "parameters: {lr: {space: loguniform, lower: 1.0e-3, upper: %s}}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished search of 3 trials; while it ran, another command was refused the same run."""
    folder = tmp_path_factory.mktemp("extend")
    (folder / "space.yaml").write_text(SPACE % "1.0e-1")
    run = RunDir(folder / "run")
    search("--trials=3", f"--space={folder / 'space.yaml'}", f"--out={run.path}")
    check_nothing_is_lost(run.path, 3)
    return run


def search(*more: str) -> None:
    """In this process: what a search goes on from is the run and the study, and not Ray's."""
    assert main([*SMALL, *more]) == 0


def losses(run: RunDir) -> dict[int, float]:
    table = pd.read_csv(run.trials_csv)
    return dict(zip(table["trial"], table["eval_loss"], strict=True))


def test_a_finished_run_is_extended_even_where_its_files_were_cut_off(
    run: RunDir, tmp_path: Path
) -> None:
    extended = RunDir(tmp_path / "run")
    shutil.copytree(run.path, extended.path)
    before = losses(extended)
    # As a crash in the middle of writing leaves them.
    with extended.events_jsonl.open("a") as file:
        file.write('{"event": "trial_started", "trial": 3, "conf')
    (extended.path / "study.db-journal").write_bytes(b"")
    extended.search_yaml.unlink()  # so what it says has to be said again

    search("--resume", str(extended.path), f"--space={extended.space_yaml}", "--trials=5")

    check_nothing_is_lost(extended.path, 5)
    after = losses(extended)
    assert {trial: after[trial] for trial in before} == before
    started = [e["trial"] for e in events(extended.path) if e["event"] == "trial_started"]
    assert sorted(started) == [0, 1, 2, 3, 4]

    wider = tmp_path / "wider.yaml"
    wider.write_text(SPACE % "1.0")
    accepted = ["--trials=6", f"--space={wider}", "--allow-changed-space"]
    search("--resume", str(extended.path), *accepted)

    check_nothing_is_lost(extended.path, 6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--space=deep"], "--space: lr: loguniform 0.001 to 0.1, now"),
        (["--model={other}"], "--model: must stay as the run started; it started with demo, got"),
        (["--train={train}"], "--train: must stay as the run started; it started with None, got"),
        (["--steps=9"], "--steps: must stay as the run started; it started with 6, got 9"),
        (
            ["--dtype=bfloat16"],
            "--dtype: must stay as the run started; it started with float32, got",
        ),
    ],
)
def test_what_makes_trials_incomparable_is_refused(
    run: RunDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    said: str,
) -> None:
    flags(tmp_path)  # writes them
    files = {"other": tmp_path / "tiny", "train": tmp_path / "train.csv"}
    before = ended(run.path)

    given = [word.format(**files) for word in changed]
    assert main(["--resume", str(run.path), "--trials=5", *given]) == 2

    error = capsys.readouterr().err
    assert said in error
    assert "--allow-changed-space" in error
    assert ended(run.path) == before


def test_data_that_were_changed_in_place_are_refused(run: RunDir) -> None:
    began = next(e for e in run.events() if e["event"] == "search_started")
    config = SearchConfig(resume=run.path)
    check_same_data(config, run, began["fingerprint"])

    with pytest.raises(ConfigError, match="data"):
        check_same_data(config, run, "another")


def test_choices_that_optuna_cannot_join_are_refused_all_the_same(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("parameters: {lr: {space: choice, categories: [0.01, 0.1]}}\n")
    given = ["--trials=5", f"--space={other}", "--allow-changed-space"]

    assert main(["--resume", str(run.path), *given]) == 2
    assert "Optuna cannot use the old trials, because lr" in capsys.readouterr().err


def test_train_gives_the_losses_of_the_searchs_best_trial(run: RunDir, tmp_path: Path) -> None:
    again = RunDir(tmp_path / "again")

    assert train.main([f"--config={run.best_yaml}", f"--out={again.path}", "--quiet"]) == 0

    best = load(run).best
    history = load(run).history
    trial, alone = history[history["trial"] == best["trial"]], load(again).history
    assert list(alone["step"]) == list(trial["step"])
    all_rows = list(trial["eval_rows"] == 24)  # where nothing is decided, a search looks at few
    assert all_rows[-1]
    for column, of in (("train_loss", slice(None)), ("eval_loss", all_rows)):
        # float32, summed in another order: the tolerance that docs/prompts.md names
        assert list(alone[column][of]) == pytest.approx(list(trial[column][of]), rel=1e-5)
    assert (again.prompts / "prompts.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_commands_at_once_on_one_storage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    runs = [tmp_path / name for name in "ab"]
    command = [sys.executable, "-m", "tune_app.search", *SMALL, "--trials=2"]
    both = [subprocess.Popen([*command, f"--storage={storage}", f"--out={run}"]) for run in runs]
    assert [search.wait(240) for search in both] == [0, 0]

    names = [e["study"] for run in runs for e in events(run) if e["event"] == "search_started"]
    assert len(set(names)) == 2
    for run, name in zip(runs, names, strict=True):
        told = optuna.load_study(study_name=name, storage=storage).trials
        assert [trial.state.name for trial in told] == ["COMPLETE", "COMPLETE"]
        assert sorted(losses(RunDir(run)).values()) == sorted(trial.value for trial in told)
