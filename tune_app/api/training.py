"""One config trained from Python: `run_training`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tune_app.api.given import config_of, data_files, named_as_arguments
from tune_app.api.search import Run, SearchFailed, kept
from tune_app.apply.export import export_best
from tune_app.report.tables import write_tables
from tune_app.run.run_dir import RunDir, Status, new_run
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.search.checks import check_everything
from tune_app.train.one_process import Terminal
from tune_app.train.single import train_single

_BOTH = {field.name for field in fields(TrialConfig)} & {f.name for f in fields(SearchConfig)}


def run_training(
    config: TrialConfig | Mapping[str, Any] | str | Path = "",
    *,
    train: Any = None,
    valid: Any = None,
    test: Any = None,
    **settings: Any,
) -> Run:
    """Trains one config alone, like `python -m tune_app.train`, and returns a run of one trial,
    with its prompts, and with the results on the test split in `run.trials`.

    config: a TrialConfig (`run.best`), a mapping of its fields, or a best.yaml, whose other
        settings are used too; by default, the documented default
    data and settings: as for `run_search`; settings take precedence over a file's

    Raises ConfigError with all mistakes, SearchFailed if training diverges or the swarm is gone.
    """
    with named_as_arguments(), tempfile.TemporaryDirectory(prefix="tune_app-") as staged:
        data = data_files({"train": train, "valid": valid, "test": test}, Path(staged))
        given = {**settings, **data}
        now = config_of(given)
        if isinstance(config, str | Path) and str(config):
            file = SearchConfig.from_yaml(Path(config))
            now = replace(file, **{name: getattr(now, name) for name in given})
            trial = TrialConfig.from_dict(file.trial or {}, now.base_trial())
        elif isinstance(config, TrialConfig):
            trial = config
        else:
            trial = TrialConfig.from_dict(
                dict(config) if isinstance(config, Mapping) else {}, now.base_trial()
            )
        trial = replace(trial, **{name: getattr(now, name) for name in _BOTH & {*given}})
        check_everything(replace(now, trial=trial.to_dict(), prompt_length=trial.prompt_length))
        run = RunDir(now.out) if now.out else new_run("train-")
        with run.lock(), Terminal(quiet=True) as terminal:
            now = kept(now, Path(staged), run)
            status, reason = train_single(now, trial, run, terminal, lambda *_: None)
        write_tables(run)
        if status != Status.FINISHED:
            raise SearchFailed(f"{reason}; the run is in {run.path}")
        export_best(run)
        return Run(run.path)
