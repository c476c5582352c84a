"""The files for other programs: three CSV tables and best.yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from tune_app.report.importance import importance
from tune_app.report.results import Results, load
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import settings_with
from tune_app.run.settings import Role


def tables(results: Results) -> dict[Path, Callable[[], str]]:
    """trials.csv, history.csv, importance.csv and, if there is a best trial, best.yaml: the files
    and functions that make their content."""
    run, best = results.run, results.best
    made: dict[Path, Callable[[], str]] = {
        run.trials_csv: lambda: results.trials.to_csv(index=False),
        run.history_csv: lambda: results.history.to_csv(index=False),
        run.importance_csv: lambda: importance(results).to_csv(index=False),
    }
    if best is not None:
        made[run.best_yaml] = lambda: best_yaml(results, int(best["trial"]))
    return made


def write_tables(run: RunDir) -> Results:
    """Writes the tables of a run."""
    results = load(run)
    for path, content in tables(results).items():
        run.write_atomic(path, content())
    return results


def best_yaml(results: Results, trial: int) -> str:
    """The search's own settings with a trial's config under `trial`: goes back into --config."""
    own = ("trial", *settings_with(Role.ONE_CALL))
    settings = {key: value for key, value in results.settings.items() if key not in own}
    document = {**settings, "trial": results.configs.get(trial, {})}
    head = f"# Trial {trial} of {results.run.path.name}. For --config of search and train.\n"
    return head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
