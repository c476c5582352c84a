"""The best prompts of a run, as a folder that can be used and passed on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from tune_app.apply.prompts_folder import About, write_prompts
from tune_app.models.folder import model_folder
from tune_app.models.identity import ModelIdentity
from tune_app.report.results import Results, load
from tune_app.report.verdict import verdict
from tune_app.run.passwords import without_passwords
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.run_state import RunState
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig, settings_with
from tune_app.run.settings import Role
from tune_app.tasks.base import Task
from tune_app.tasks.known import task_named
from tune_app.train.checkpoint import read_weights


def export_best(run: RunDir) -> Path | None:
    """Writes the winner's prompts to RUN/prompts and returns that folder.

    With confirmation, they are those of the winning config's judged run with the best *validation*
    result, so that its test results stay fair. Without, those of the trial with the best validation
    result. Returns None and writes nothing if no trial has finished.
    """
    results = load(run)
    row = _winner(results)
    if row is None:
        return None
    number = int(row["trial"])
    of = number if pd.isna(row["of"]) else int(row["of"])
    file = run.checkpoint(number) / "state.pt"
    try:
        weights = read_weights(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read, so no prompts are exported: {error}") from None
    settings = SearchConfig.from_yaml(run.search_yaml)
    begun = RunState.read(run).first
    assert begun is not None  # since a trial has finished
    about = About(
        model=ModelIdentity.of(
            settings.model,
            model_folder(settings.model, settings.revision),
            settings.revision,
        ),
        task=settings.task,
        class_names=begun.classes,
        max_length=settings.max_length,
        trial=of,
        trained_as=number,
        config=TrialConfig.from_dict(results.configs[number]),
        metrics=_metrics(row, results, task_named(settings.task)),
        search=_for_others({name: getattr(settings, name) for name in settings_with(Role.PROMPTS)}),
        data_fingerprint=begun.fingerprint,
        tune_app=_version(),
        scale=None if results.data is None else results.data.scale,
        answer=_answer(results),
    )
    return write_prompts(run.prompts, weights, about)


def _for_others(settings: dict[str, Any]) -> dict[str, Any]:
    """A folder of prompts is passed on: what opens the data's address is not."""
    return {
        name: without_passwords(value) if isinstance(value, str) else value
        for name, value in settings.items()
    }


def _answer(results: Results) -> str:
    """The search's answer; "" for a config that was trained alone."""
    if not results.baselines:
        return ""
    found = verdict(results)
    return f"{found.headline}. {found.sentence}"


def _winner(results: Results) -> pd.Series | None:
    """The row whose weights are the best prompts."""
    best = results.best
    if best is None:
        return None
    trials = results.trials
    again = trials[(trials["of"] == best["trial"]) & (trials["status"] == Status.FINISHED)]
    again = again[again["eval_loss"].notna()]
    judged = again[(again["look"] > 0).fillna(False)]
    again = again if judged.empty else judged
    if again.empty:
        return best
    cost = again[results.objective.column].map(results.objective.cost)
    return again.assign(cost=cost).sort_values(["cost", "trial"]).iloc[0]


def _metrics(row: pd.Series, results: Results, task: Task) -> dict[str, dict[str, float]]:
    names = dict.fromkeys([task.metric, results.objective.name, *task.objectives])
    del names["loss"]
    splits = {"valid": {"loss": row["eval_loss"]} | {name: row.get(name) for name in names}}
    tested = {name: row.get(f"test_{name}") for name in names}
    splits["test"] = {"loss": row.get("test_loss")} | tested
    known = {
        split: {name: float(value) for name, value in values.items() if pd.notna(value)}
        for split, values in splits.items()
    }
    return {split: values for split, values in known.items() if values}


def _version() -> str:
    try:
        return version("tune-app")
    except PackageNotFoundError:  # a checkout that is not installed
        return "from a checkout"
