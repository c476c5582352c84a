"""The Optuna study of a run: where it is, and how a killed search resumes it."""

from __future__ import annotations

import shlex
import sqlite3
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
import sqlalchemy
from optuna.trial import TrialState as StudyState

from tune_app.run.events import (
    Event,
    TrialEnded,
    TrialReported,
    TrialStarted,
)
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.run_state import RunState, TrialState
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report, outcome
from tune_app.study.space import origin_of

STUDY_NAME = "tune_app"
# A new storage cannot be opened while another command creates its tables.
_ATTEMPTS = 5
PATIENCE_S = 60.0  # while another process, such as a backup, locks the study's file


def study_name(config: SearchConfig, run: RunDir) -> str:
    """The study's name: each run has its own study, also in a storage that holds many.

    So two searches in one storage never share a study, and the run's lock keeps two commands from
    using the same one.
    """
    if config.storage is None:
        return STUDY_NAME
    begun = RunState.read(run).first
    return begun.study if begun is not None else f"{run.path.name}-{uuid.uuid4().hex[:8]}"


def open_storage(config: SearchConfig, run: RunDir) -> optuna.storages.BaseStorage:
    """The run's own SQLite file, or --storage. Raises ConfigError if it cannot be opened."""
    if config.storage is not None:
        return _shared_storage(config.storage)
    return _opened(lambda: _own_storage(run.create().study_db), str(run.study_db))


def _shared_storage(url: str) -> optuna.storages.BaseStorage:
    return _opened(lambda: optuna.storages.get_storage(url), f"--storage: {url!r}")


def _opened(
    opens: Callable[[], optuna.storages.BaseStorage], what: str
) -> optuna.storages.BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(_ATTEMPTS):
        try:
            return opens()
        except Exception as error:  # SQLAlchemy, Optuna and database drivers: many unrelated types
            reason = _first_line(error)
            if isinstance(error, sqlalchemy.exc.ArgumentError) or "unable to open" in reason:
                break  # a wrong address or folder, which waiting does not mend
        time.sleep(0.2 * attempt)
    raise ConfigError(f"{what} cannot be opened as an Optuna storage: {reason}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _own_storage(file: Path) -> optuna.storages.BaseStorage:
    """SQLite with a write-ahead log, for which Optuna has no setting: neither the tables at the
    start nor a trial's dozen commits wait for the disk (14 ms instead of 70 to 300), and a crash
    loses the last ones, not the file.
    """
    connect = {"creator": partial(_log_ahead, file)}
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}", engine_kwargs=connect)
    return optuna.storages.get_storage(storage)


def is_locked(error: BaseException | None) -> bool:
    """Whether an error was caused by another process that locked the study for too long."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if "database is locked" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _log_ahead(file: Path) -> sqlite3.Connection:
    # SQLAlchemy's pool gives it to one thread at a time.
    connection = sqlite3.connect(file, timeout=PATIENCE_S, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def check_study(config: SearchConfig) -> None:
    """Raises the ConfigError that `open_study` would raise, before anything starts. Creates no
    study."""
    if config.out is not None and _begun(run := RunDir(config.out)):
        open_study(config, run, study_name(config, run))
    elif config.storage is not None:
        _shared_storage(config.storage)


def open_study(config: SearchConfig, run: RunDir, name: str) -> optuna.Study:
    """The run's study, created if the run has none yet.

    Raises ConfigError if its storage cannot be opened or no longer has the study, if the study is
    damaged, or if it belongs to another run: a copied folder names the study of its original.
    """
    storage, where = open_storage(config, run), config.storage or run.study_db
    try:
        study = optuna.create_study(
            study_name=name, storage=storage, direction="minimize", load_if_exists=True
        )
        missing_events(study, RunState.read(run))  # reads all of it
    except Exception as error:  # SQLAlchemy's, Optuna's, json's or ours, by what is damaged
        if is_locked(error):
            raise
        raise ConfigError(
            f"{where}: the run's study {name!r} cannot be read: {_first_line(error)}. Put back an "
            f"undamaged copy, or begin a new search from what this one found: --warm-start "
            f"{shlex.quote(str(run.path))}"
        ) from None
    if config.storage is not None:
        owner = study.user_attrs.get("run", str(run.path))
        if owner != str(run.path) and Path(owner).exists():  # otherwise the folder was moved
            raise ConfigError(
                f"--resume: the study {name!r} in {config.storage} belongs to {owner}, and "
                f"{run.path} is a copy of it; resume {owner}."
            )
        study.set_user_attr("run", str(run.path))
    if _begun(run) and not study.get_trials(deepcopy=False):
        raise ConfigError(
            f"{where} does not contain this run's study {name!r}; without "
            "it, all trials would be repeated. Give the --storage that the run started with."
        )
    return study


def _begun(run: RunDir) -> bool:
    return any(trial.started is not None for trial in RunState.read(run).trials.values())


def requeue_unfinished(study: optuna.Study) -> None:
    """Makes the study ask again for trials that no process is working on any more.

    Optuna keeps an unfinished trial's number and params, so the trial resumes under its own number.
    There is no public call to go back from RUNNING to WAITING.
    """
    for trial in study.get_trials(deepcopy=False, states=(StudyState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, StudyState.WAITING)


def missing_events(study: optuna.Study, run: RunState) -> list[Event]:
    """Events that are missing for the study's finished trials: a kill may come after the study was
    written and before the event was."""
    missing: list[Event] = []
    for trial in study.get_trials(deepcopy=False):
        number, known = trial.number, trial.user_attrs
        seen = run.trials.get(number, TrialState(number))
        if not trial.state.is_finished() or seen.ended is not None:
            continue
        config = TrialConfig.from_known(known["config"])
        if seen.started is None:
            missing.append(TrialStarted(trial=number, origin=origin_of(known), config=config))
        last = Report.from_flat(known["report"]) if known.get("report") else None
        if last is not None and seen.step < last.step:
            missing.append(TrialReported(trial=number, report=last))
        status, reason = outcome(last, config.steps)
        if trial.state == StudyState.FAIL:
            status, reason = Status.FAILED, "unknown"
        missing.append(TrialEnded(trial=number, status=status, reason=reason))
    return missing
