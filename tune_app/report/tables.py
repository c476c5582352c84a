"""The files beside events.jsonl that other programs read: three CSV tables and best.yaml."""

from __future__ import annotations

import yaml

from tune_app.report.importance import importance
from tune_app.report.results import Results, load
from tune_app.run.run_dir import RunDir

# What a second search must not take over from the first.
_OF_THIS_RUN = ("out", "trial")


def write_tables(run: RunDir) -> Results:
    """Writes trials.csv, history.csv, importance.csv and, where a trial has won, best.yaml."""
    results = load(run)
    run.write_atomic(run.trials_csv, results.trials.to_csv(index=False))
    run.write_atomic(run.history_csv, results.history.to_csv(index=False))
    run.write_atomic(run.importance_csv, importance(results).to_csv(index=False))
    if results.best is not None:
        run.write_atomic(run.best_yaml, best_yaml(results, int(results.best["trial"])))
    return results


def best_yaml(results: Results, trial: int) -> str:
    """The search's own settings with a trial's config under `trial`: goes back into --config."""
    settings = {key: value for key, value in results.settings.items() if key not in _OF_THIS_RUN}
    document = {**settings, "trial": results.configs.get(trial, {})}
    head = f"# Trial {trial} of {results.run.path.name}. For --config of search and train.\n"
    return head + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
