"""The Python API: in process where it can be, and in a Ray of the caller's own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from pages import ROOT, blocks
from tiny_models import write_tiny_model
from trained import write_rows

import tune_app
from tune_app.api.given import space_name
from tune_app.api.search import SearchFailed
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError
from tune_app.study.yaml_space import load_space

SMALL = {
    "backbone": "local",
    "executor": "in-process",
    "steps": 4,
    "batch_size": 2,
    "max_length": 12,
    "prompt_length": 3,
}


def space_of_lr(trial: optuna.Trial) -> dict[str, float]:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return {"eps": lr * 1e-6}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_tiny_model("llama", home / "models" / "Llama-3.1-8B")
    rows = write_rows(home / "reviews.csv", 0, 60)
    rows.write_text(rows.read_text().replace("label", "stars", 1))
    return home


@pytest.fixture(scope="module")
def settings(home: Path) -> dict[str, Any]:
    return {**SMALL, "model": str(home / "models" / "Llama-3.1-8B"), "label_column": "stars"}


@pytest.fixture(scope="module")
def found(home: Path, settings: dict[str, Any]) -> SimpleNamespace:
    """A finished search over a table, and what the process was like before and after."""

    def process() -> dict[str, Any]:
        return {
            "environment": dict(os.environ),
            "handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            "filters": list(warnings.filters),
            "threads": torch.get_num_threads(),
            "verbosity": optuna.logging.get_verbosity(),
        }

    table = SimpleNamespace(to_pandas=lambda: pd.read_csv(home / "reviews.csv"))
    before = process()
    run = tune_app.run_search(
        train=table, trials=3, confirm=1, confirm_seeds=1, out=home / "my run", **settings
    )
    return SimpleNamespace(run=run, before=before, after=process(), table=table.to_pandas())


def test_importing_it_loads_nothing_heavy_and_names_all(tmp_path: Path) -> None:
    program = "import sys, tune_app; print(*sys.modules); print(dir(tune_app))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    loaded, names = said.stdout.splitlines()
    assert {"torch", "ray", "pandas", "optuna", "yaml"}.isdisjoint(loaded.split())
    assert all(name in names for name in tune_app.__all__)
    assert (ROOT / "tune_app" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'run_serach'"):
        _ = tune_app.run_serach


def test_a_search_finds_what_the_command_would(found: SimpleNamespace) -> None:
    run, trials = found.run, found.run.trials
    searched = trials[trials["origin"] != "confirm"]
    assert sorted(searched["trial"]) == [0, 1, 2]
    assert set(trials["status"]) == {"finished"}
    assert len(run.confirmation) == 2
    assert set(run.history["trial"]) == set(trials["trial"])
    assert run.best == tune_app.TrialConfig.from_dict(run.best.to_dict())
    told = {trial.number: trial.value for trial in run.study.trials}
    assert told == pytest.approx(dict(zip(searched["trial"], searched["objective"], strict=True)))
    assert run.report.is_file()
    assert "3 finished" in repr(run)


def test_the_process_is_as_it_was(found: SimpleNamespace) -> None:
    assert found.after == found.before


def test_nothing_is_printed_unless_asked(
    settings: dict[str, Any], home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = settings | {"train": home / "reviews.csv", "trials": 1, "confirm": 0, "steps": 2}
    tune_app.run_search(**given, out=tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")

    tune_app.run_search(**given, out=tmp_path / "told", progress=True)
    assert "1/1  trial 0  finished" in capfd.readouterr().out


def test_a_table_is_found_again_by_a_resumed_run(
    found: SimpleNamespace, tmp_path: Path, home: Path
) -> None:
    again = tune_app.run_search(resume=found.run.path, trials=4, confirm=0)

    assert sorted(again.trials.query("origin != 'confirm'")["trial"]) == [0, 1, 2, 3]
    kept = tune_app.SearchConfig.from_yaml(RunDir(again.path).search_yaml)
    assert kept.train == str(again.path / "given" / "train.parquet")


def test_an_earlier_run_begins_a_new_one_and_a_resume_keeps_that(
    found: SimpleNamespace, settings: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    given = {**settings, "train": home / "reviews.csv", "steps": 3, "concurrency": 1, "confirm": 0}
    asked = {"trials": 3, "warm_start": [found.run], "out": tmp_path / "new", "seed": 4}
    run = tune_app.run_search(**given, **asked)
    first = run.trials.set_index("origin").loc["warm_start"]
    earlier = found.run.trials.query("origin == 'suggested'")["lr"]
    assert float(first["lr"]) in list(earlier)
    assert "Warm start from" in (run.path / "summary.txt").read_text()
    assert "Warm start from" in run.report.read_text()

    more = tune_app.run_search(resume=run.path, trials=5)
    whole = tune_app.run_search(**given, **asked | {"trials": 5, "out": tmp_path / "whole"})
    lrs = [sorted(each.trials[["trial", "lr"]].itertuples(index=False)) for each in (more, whole)]
    assert lrs[0][:3] == lrs[1][:3]
    assert sum(origin == "warm_start" for origin in more.trials["origin"]) == 1
    written = (more.path / "events.jsonl").read_text()
    assert written.count('"warm_started"') == 1
    with pytest.raises(ConfigError, match="warm_start: is for the beginning of a search"):
        tune_app.run_search(resume=run.path, trials=6, warm_start=found.run)


def test_the_prompts_of_a_run(found: SimpleNamespace) -> None:
    with found.run.prompts() as prompts:
        ((name, probability),) = prompts.classify(["wing nest song"])
        assert name in ("bird", "fish", "tree")
        assert 1 / 3 < probability < 1
        assert prompts.classify([]) == []
        figures = prompts.evaluate(found.table, label_column="stars")
        assert figures.keys() >= {"loss", "accuracy"}
        with pytest.raises(ValueError, match="for classification, not for causal-lm"):
            prompts.complete("wing")
    with tune_app.load_prompts(found.run.path / "prompts", device="cpu") as prompts:
        assert prompts.evaluate(found.table, label_column="stars") == pytest.approx(figures)


def test_training_one_config_gives_the_losses_of_its_trial(
    found: SimpleNamespace, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = {k: v for k, v in settings.items() if k not in ("executor", "steps", "batch_size")}
    run = tune_app.run_training(found.run.best, train=found.table, out=tmp_path / "one", **given)

    best = next(
        number
        for number, config in found.run._results.configs.items()
        if config == found.run.best.to_dict()
    )
    trained = found.run.history.query(f"trial == {best}")
    assert list(run.history["eval_loss"]) == pytest.approx(list(trained["eval_loss"]), rel=1e-5)
    assert run.trials["test_loss"].notna().all()


def test_mistakes_come_together_and_name_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tune_app.run_search(trials=0, batch_size=0, train="nowhere.csv", out=tmp_path / "run")
    text = str(caught.value)
    assert "trials: must be 1 or more" in text
    assert "batch_size: must be 1 or more" in text
    assert "train: " in text
    assert "--" not in text
    with pytest.raises(ConfigError, match=r"trails: unknown\. Did you mean 'trials'"):
        tune_app.run_search(trails=3)
    with pytest.raises(ConfigError, match=r"train: must be a path, a DataFrame .* got list"):
        tune_app.run_search(train=[1, 2])
    with pytest.raises(ConfigError, match="there is no run in"):
        tune_app.load_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_trains_nothing_is_an_error(
    settings: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune_app.train import loop

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(loop.TrainingRun, "_train_step", broken)
    with pytest.raises(SearchFailed, match="all trials have failed"):
        tune_app.run_search(
            **settings, train=home / "reviews.csv", trials=1, out=tmp_path / "run", confirm=0
        )
    events = [event["event"] for event in RunDir(tmp_path / "run").events()]
    assert events.count("trial_retried") == 2
    table = tune_app.load_run(tmp_path / "run").trials
    assert list(table["reason"]) == ["RuntimeError: no such kernel"]


def test_spaces_of_functions_and_of_ray_tunes_domains(tmp_path: Path) -> None:
    from ray import tune

    space = load_space(space_name(space_of_lr, tmp_path))
    assert list(space.distributions()) == ["lr"]
    domains = {
        "lr": tune.loguniform(1e-4, 1e-1),
        "warmup_steps": tune.qrandint(0, 100, 10),
        "scheduler": tune.choice(["linear", "cosine"]),
        "weight_decay": 0.1,
    }
    space = load_space(space_name(domains, tmp_path))
    found = space.distributions()
    assert (found["lr"].low, found["lr"].high, found["lr"].log) == (1e-4, 1e-1, True)
    assert (found["warmup_steps"].high, found["warmup_steps"].step) == (100, 10)
    assert found["scheduler"].choices == ("linear", "cosine")
    assert space.fixed == {"weight_decay": 0.1}
    for wrong in (lambda trial: {}, {"lr": tune.grid_search([0.1])}, {"lr": tune.randn()}, 3):
        with pytest.raises(ConfigError, match="must be"):
            space_name(wrong, tmp_path)


PAGE = ROOT / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_snippets_of_the_page_run_one_after_another(
    home: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """In one process, as in a notebook, with a Ray that was there before and stays."""
    import ray

    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    small = {k: v for k, v in SMALL.items() if k != "executor"} | {"confirm": 0}
    told = ", ".join(f"{name}={value!r}" for name, value in small.items())
    inside = f"executor='in-process', model={settings['model']!r}"
    names: dict[str, Any] = {}
    try:
        for number, snippet in enumerate(blocks(PAGE, "python")):
            snippet = snippet.replace("trials=16,\n", f"trials=2, {told},\n")
            snippet = snippet.replace("trials=16", f"trials=2, {told}, {inside}")
            snippet = snippet.replace("trials=20", "trials=3").replace("steps=60", "steps=2")
            snippet = snippet.replace("num_samples=8", "num_samples=2")
            snippet = snippet.replace(", seed=7", ", seed=7, backbone='local'")
            file = home / f"snippet{number}.py"
            file.write_text(snippet)  # where `inspect` finds a function's source
            exec(compile(snippet, str(file), "exec"), names)
        assert ray.is_initialized()
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        hosts = [a for a in ray.util.list_named_actors(all_namespaces=True) if a]
        assert [host["name"][:5] for host in hosts] == ["host-"]  # the trainable's, one for all
    finally:
        ray.shutdown()
    assert len(names["results"]) == 2
    assert names["results"].num_errors == 0
    assert len(names["run"].trials) == 3


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_example_script_runs(tmp_path: Path) -> None:
    """OptunaSearch, ASHA and ResultGrid over the trainable; a checkpoint of the best."""
    command = [sys.executable, "examples/ray_tune_script.py", "--trials=3", "--steps=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=350)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 trials, 0 failed" in done.stdout
    (checkpoint,) = re.findall(r"checkpoint: (\S+)", done.stdout)
    assert (Path(checkpoint) / "state.pt").is_file()
