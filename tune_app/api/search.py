"""Searches from Python: `run_search`, and their results (`Run`, `load_run`)."""

from __future__ import annotations

import _thread
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd

from tune_app.api.given import config_of, data_files, named_as_arguments, space_name
from tune_app.report.results import Results, load
from tune_app.report.write import write_all
from tune_app.run.run_dir import RunDir, Status, new_run
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.search.checks import check_everything
from tune_app.search.executor import StartError, open_executor
from tune_app.search.live import LiveView
from tune_app.search.stop_conditions import StopConditions
from tune_app.search.tuning import whole_search
from tune_app.study.storage import STUDY_NAME, check_study, open_storage

if TYPE_CHECKING:
    from tune_app.api.prompts import TunedPrompts


class SearchFailed(RuntimeError):
    """Training failed from the start or later on; the text says why, and where the run is."""


def run_search(
    *,
    train: Any = None,
    valid: Any = None,
    test: Any = None,
    space: Any = "default",
    warm_start: Sequence[str | Path | Run] = (),
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Searches, confirms the best configs, and returns the run, like `python -m tune_app.search`.

    train, valid, test: a path, a URL, a DataFrame, or an object with `to_pandas()`; without
        `train`, the built-in text of the task. Tables are saved in the run's folder.
    space: a name, a path, a function of an Optuna trial, or a dict of Ray Tune's domains, in which
        plain values are constants: `{"lr": tune.loguniform(1e-4, 1e-1), "warmup_steps": 10}`
    warm_start: earlier runs, whose best configs run first and shape what is suggested
    progress: print a line for each trial; otherwise nothing is printed
    settings: the flags of `python -m tune_app.search` by name: `trials=16`, `model="demo"`,
        `executor="in-process"`, ...; `resume=FOLDER` continues a run

    Leaves no signal handler behind and never ends the process: Ctrl-C raises KeyboardInterrupt, and
    `run_search(resume=FOLDER)` continues. If Ray is already running, it is used and left running.

    Raises ConfigError with all mistakes, SearchFailed if no trial could be trained.
    """
    with named_as_arguments(), tempfile.TemporaryDirectory(prefix="tune_app-") as staged:
        folder = Path(staged)
        data = data_files({"train": train, "valid": valid, "test": test}, folder)
        given = {"quiet": not progress, **settings, **data}
        if warm_start:
            given["warm_start"] = _paths(warm_start)
        if settings.get("resume") is not None:
            config = _resumed(given, space, folder)
        else:
            config = config_of({**given, "space": space_name(space, folder)})
        checked = check_everything(config)
        check_study(config)
        run = RunDir(config.out) if config.out else new_run()
        with run.lock(), _process_as_before():
            config = replace(kept(config, folder, run), out=run.path)
            return _searched(config, replace(checked, text=_kept_text(checked.text, folder, run)))


def _paths(runs: Any) -> list[str]:
    """The folders of runs, given as `Run`s or paths, or as a single one."""
    several = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    return [str(run.path if isinstance(run, Run) else run) for run in several]


def load_run(path: str | Path) -> Run:
    """The run in a folder, whether it is running, has ended or was killed.

    Raises ConfigError if there is none.
    """
    run = RunDir(path)
    if not run.events_jsonl.is_file():
        raise ConfigError(f"there is no run in {str(path)!r} (no {run.events_jsonl.name}).")
    return Run(run.path)


class Run:
    """The results of a search. Tables are read once; call `load_run` to read them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run = RunDir(path)

    def __repr__(self) -> str:
        counts = ", ".join(f"{amount} {status}" for status, amount in self._results.counts.items())
        return f"Run({str(self.path)!r}: {counts or 'no trials'})"

    @cached_property
    def _results(self) -> Results:
        return load(self._run)

    @property
    def trials(self) -> pd.DataFrame:
        """A row for each trial, best first, confirmation runs last: trials.csv."""
        return self._results.trials

    @property
    def history(self) -> pd.DataFrame:
        """A row for each report, by trial and step: history.csv."""
        return self._results.history

    @property
    def confirmation(self) -> pd.DataFrame:
        """A row for each config that was trained again, the winner first."""
        return self._results.confirm

    @property
    def best(self) -> TrialConfig | None:
        """The best config: the confirmation's winner, or without confirmation that of the best
        trial; None if no trial has finished."""
        best = self._results.best
        if best is None:
            return None
        return TrialConfig.from_dict(self._results.configs[int(best["trial"])])

    @property
    def study(self) -> optuna.Study:
        """The Optuna study, in the run's folder or in `storage`."""
        config = SearchConfig.from_yaml(self._run.search_yaml)
        storage = open_storage(config, self._run)
        return optuna.load_study(study_name=self._results.study or STUDY_NAME, storage=storage)

    @property
    def report(self) -> Path:
        """The path of report.html, which is written now if it does not exist yet."""
        if not self._run.report_html.is_file():
            write_all(self._run)
        return self._run.report_html

    def prompts(self, **settings: Any) -> TunedPrompts:
        """The tuned prompts; `settings` as for `load_prompts`."""
        from tune_app.api.prompts import load_prompts  # imports torch

        return load_prompts(self.path, **settings)


def _searched(config: SearchConfig, space: Any) -> Run:
    from tune_app.apply.export import export_best

    run = RunDir(config.out or "")
    died = threading.Event()

    def ray_died() -> None:
        died.set()
        _thread.interrupt_main()  # it waits for Ray

    view, stop = LiveView(config, run, sys.stdout), StopConditions(config)
    try:
        with open_executor(
            config, space, run, progress=view.progress, say=view.say, ray_died=ray_died
        ) as executor:
            whole_search(config, space, run, executor, view, stop)
    except StartError as error:
        raise SearchFailed(str(error)) from error
    except KeyboardInterrupt:
        if died.is_set():
            raise SearchFailed(
                f"Ray has died; run_search(resume={str(run.path)!r}) continues."
            ) from None
        raise
    export_best(run)
    write_all(run)
    counts = load(run).counts
    if stop.exit_code == 1 or set(counts) == {Status.FAILED}:
        reason = stop.reason or "all trials have failed; trials.csv has the reasons"
        raise SearchFailed(f"{reason}; the run is in {run.path}")
    return Run(run.path)


def _resumed(given: dict[str, Any], space: Any, folder: Path) -> SearchConfig:
    """The settings that the run started with, changed by those given now."""
    from tune_app.run.flags import parse_search_args

    arguments = ["--resume", str(given["resume"])]
    if space != "default":
        given = {**given, "space": space_name(space, folder)}
        arguments += ["--space", given["space"]]
    before = parse_search_args(arguments)
    now = config_of(given)
    return replace(before, **{name: getattr(now, name) for name in given})


def kept(config: SearchConfig, folder: Path, run: RunDir) -> SearchConfig:
    """The config, with staged files moved to the run's folder."""
    moved: dict[str, Any] = {}
    for name in ("train", "valid", "test", "space"):
        value = getattr(config, name)
        if value is not None and str(value).startswith(f"{folder}/"):
            file, colon, function = str(value).partition(":")
            place = run.path / "given" / Path(file).name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
            moved[name] = f"{place}{colon}{function}"
    return replace(config, **moved)


def _kept_text(text: str, folder: Path, run: RunDir) -> str:
    return text.replace(f"{folder.resolve()}/", f"{run.path / 'given'}/")


@contextmanager
def _process_as_before() -> Iterator[None]:
    """Restores environment, signal handlers and Optuna's verbosity afterwards."""
    environment, verbosity = dict(os.environ), optuna.logging.get_verbosity()
    main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        optuna.logging.set_verbosity(verbosity)
        for number, handler in handlers.items():
            signal.signal(number, handler)
