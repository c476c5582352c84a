"""events.jsonl as DataFrames: a row for each trial, each report, and each confirmed config.

A loss that is not finite is NaN here, whatever the event says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tune_app.report.confirmation import Evidence, confirmation
from tune_app.run import test_rows
from tune_app.run.events import SearchStarted, WarmStarted
from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.run_state import RunState, TrialState
from tune_app.run.search_config import SearchConfig
from tune_app.run.typed import convert_fields, fits
from tune_app.tasks.known import TASKS
from tune_app.tasks.objectives import LOSS, OBJECTIVES, Objective
from tune_app.tasks.summary import DataSummary

# Best first: a finished trial's loss is final, a stopped one was given up.
_STANDING = {
    Status.FINISHED: 0,
    Status.STOPPED: 1,
    Status.RUNNING: 2,
    Status.DIVERGED: 3,
    Status.INTERRUPTED: 4,
    Status.FAILED: 5,
}
_ABOUT = ["trial", "status", "reason", "origin", "of", "look"]
_FINAL = ["step", "train_loss", "eval_loss", "objective"]
_COST = ["tokens", "seconds"]
_WHOLE = ["step", "tokens", "rows", "packed_tokens", "packs", "requests", "retries"]


@dataclass(frozen=True)
class Results:
    """The results of a run so far.

    trials: a row for each trial, best first, confirmation runs last. Columns: trial, status,
        reason, origin, of (the trial that a confirmation run repeats), every hyperparameter, and
        the values of the last report (step, losses, metrics, tokens, seconds).
    history: a row for each report, by trial and step.
    confirm: a row for each confirmed trial, the chosen one first; `confirmation.py` lists the
        columns.
    """

    run: RunDir
    settings: dict[str, Any]  # search.yaml; empty if it is missing or was cut off
    prompts: dict[str, Any]  # prompts.json of the exported prompts; empty before there are any
    configs: dict[int, dict[str, Any]]  # each trial's hyperparameters with their own types
    trials: pd.DataFrame
    history: pd.DataFrame
    confirm: pd.DataFrame
    evidence: Evidence | None  # the chosen config compared with the baseline, once judged
    chosen: int | None  # the config that the confirmation has chosen, by validation
    task: str
    metric: str  # the task's, such as "accuracy"
    data: DataSummary | None  # None in a run that was made before there were summaries
    objective: Objective
    study: str  # name of the Optuna study
    sampled: list[str]  # the hyperparameters that the search varies
    planned: int  # trials requested, without confirmation runs
    hosts: tuple[HostCounters, ...]  # the trial hosts' counters, once the search has ended
    running: bool
    reason: str  # why the search ended; empty while it is running, or if it died
    seconds: float  # wall time, without pauses between a kill and a resume
    warm: WarmStarted | None  # what the search took over from earlier runs
    computed: dict[str, Any] = field(default_factory=dict, repr=False)  # a cache

    @property
    def population(self) -> bool:
        """Whether trials changed their hyperparameters on the way."""
        return self.settings.get("scheduler") == "pbt"

    def changes(self, trial: int) -> list[list[Any]]:
        """What the trial's config changed on the way: `TrialConfig.changes`."""
        return list(self.configs.get(trial, {}).get("changes", []))

    @property
    def searched(self) -> pd.DataFrame:
        """The trials of the search itself, best first, without confirmation runs."""
        return self.trials[self.trials["origin"] != "confirm"]

    @property
    def finished(self) -> pd.DataFrame:
        """The trials that can win: trained to their last step, with a finite loss; best first."""
        rows = self.searched
        return rows[(rows["status"] == Status.FINISHED) & rows["eval_loss"].notna()]

    @property
    def second_metric(self) -> str:
        """The metric that is shown next to the objective: the task's, or the loss."""
        return self.metric if self.objective.name == "loss" else "loss"

    @property
    def baselines(self) -> list[int]:
        """The trials that the best config may be compared with: the documented default, and in a
        short run also the default with a warmup of a tenth; only those that have started."""
        trials = self.searched
        mine = (trials["origin"] == "default") | (trials["trial"] == 0)
        return sorted(int(trial) for trial in trials.loc[mine, "trial"])

    @property
    def default(self) -> pd.Series | None:
        """The baseline that the best config is compared with, however it ended: the better one by
        validation, or the one that was confirmed; None before there is one."""
        if self.evidence is not None:
            return self.trial(self.evidence.baseline)
        rows = self.finished
        rows = rows[rows["trial"].isin(self.baselines)]
        if not rows.empty:
            return rows.iloc[0]
        return self.trial(0)

    def trial(self, number: int) -> pd.Series | None:
        """A trial's row."""
        rows = self.trials[self.trials["trial"] == number]
        return None if rows.empty else rows.iloc[0]

    @property
    def best(self) -> pd.Series | None:
        """The best trial by validation, in the confirmation or else in the search; None if there is
        none.

        Of the chosen config and the default, it is the one with the lower mean validation cost in
        the judged runs; a config that diverges with some seeds does not win.
        """
        if self.evidence is not None:
            wins = self.evidence.ahead and not self.evidence.diverged
            return self.trial(self.evidence.trial if wins else self.evidence.baseline)
        if self.chosen is not None:
            return self.trial(self.chosen)
        return None if self.finished.empty else self.finished.iloc[0]

    def constants(self, split: str) -> dict[str, float]:
        """The metrics of always giving the most frequent answer of the training rows; {} if the
        task has none, or they are not known."""
        return _constants(self.task, self.data, split)

    @property
    def counts(self) -> dict[Status, int]:
        """Trials of the search by status, without zeros."""
        statuses = list(self.searched["status"])
        return {status: statuses.count(status) for status in Status if status in statuses}


def load(run: RunDir) -> Results:
    """Reads a run, whether it is running, has ended or was killed."""
    state = RunState.read(run)
    search = state.search or SearchStarted()
    running = state.ended is None and run.in_use()
    open_status = Status.RUNNING if running else Status.INTERRUPTED
    ordered = [state.trials[number] for number in sorted(state.trials)]
    trials = _trials(ordered, open_status)
    history = _history(ordered)
    metric = search.metric
    if metric not in _metrics():
        metric = next((known for known in _metrics() if known in history), _metrics()[0])
    settings, data = _settings(run), _data(search)
    objective = OBJECTIVES.get(str(settings.get("objective")), LOSS)
    confirmed = confirmation(
        trials,
        [t.number for t in ordered if t.origin == "default" or t.number == 0],
        metric if objective.name == "loss" else "loss",
        objective=objective,
        most=settings.get("confirm_seeds"),
        rows_of=lambda trial: test_rows.read(run.test_rows(trial)),
        constant=_constants(search.task, data, "test").get(objective.name),
    )
    return Results(
        run=run,
        settings=settings,
        prompts=_prompts(run),
        configs={t.number: t.config.to_dict() for t in ordered if t.config is not None},
        trials=trials,
        history=history,
        confirm=confirmed.table,
        evidence=confirmed.evidence,
        chosen=confirmed.chosen,
        task=search.task,
        metric=metric,
        data=data,
        objective=objective,
        study=search.study or "tune_app",
        sampled=[name for name in search.sampled if name in trials],
        planned=search.trials,
        hosts=() if state.ended is None else state.ended.hosts,
        running=running,
        reason="" if state.ended is None else state.ended.reason,
        seconds=state.seconds,
        warm=state.warm,
    )


def _trials(trials: list[TrialState], open_status: Status) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    hyperparameters: dict[str, None] = {}  # an ordered set
    reported: dict[str, None] = {}
    for trial in trials:
        config = {} if trial.config is None else trial.config.to_dict()
        if config.get("changes"):
            config["changes"] = json.dumps(config["changes"])
        final = {} if trial.last is None else trial.last.flat()
        final = {k: v for k, v in final.items() if k != "learning_rate" and k not in config}
        hyperparameters |= dict.fromkeys(config)
        reported |= dict.fromkeys(final)
        about = {
            "trial": trial.number,
            "status": open_status if trial.ended is None else trial.status,
            "reason": trial.reason,
            "origin": trial.origin,
            "of": trial.of,
            "look": trial.look,
        }
        rows.append({**about, **config, **final})
    usual = [*_FINAL, *_metrics(), "test_loss", *(f"test_{metric}" for metric in _metrics())]
    known = [name for name in usual if name in reported or name in _FINAL[:3]]
    extra = [name for name in reported if name not in (*known, *_COST)]
    columns = list(dict.fromkeys([*_ABOUT, *hyperparameters, *known, *_COST, *extra]))
    table = pd.DataFrame(rows, columns=columns)
    table["status"] = [Status(status) for status in table["status"]]
    table = _numeric(table, [*usual, *_COST, *extra], integers=["of", "look", *_WHOLE])
    keys = pd.DataFrame(
        {
            "confirm": table["origin"] == "confirm",
            "standing": [_STANDING[status] for status in table["status"]],
            "cost": _costs(table),
            "trial": table["trial"],
        }
    )
    order = keys.sort_values(["confirm", "standing", "cost", "trial"], na_position="last").index
    return table.loc[order].reset_index(drop=True)


def _costs(table: pd.DataFrame) -> pd.Series:
    """What the search minimised, by trial; NaN if the loss is not a number."""
    loss = table["eval_loss"]
    return table["objective"].fillna(loss).where(loss.notna()) if "objective" in table else loss


def _history(trials: list[TrialState]) -> pd.DataFrame:
    rows = [
        {"trial": event.trial, "time": event.time, **event.report.flat()}
        for trial in trials
        for event in trial.reports
    ]
    first = ["trial", "step", "train_loss", "eval_loss", "learning_rate", *_COST, "time"]
    extra = dict.fromkeys(key for row in rows for key in row if key not in first)
    table = pd.DataFrame(rows, columns=[*first, *extra])
    return _numeric(table, [name for name in table if name != "trial"], integers=_WHOLE)


def _numeric(table: pd.DataFrame, names: list[str], integers: list[str]) -> pd.DataFrame:
    """Columns as numbers: a null is NaN in a float column and <NA> in one of whole numbers."""
    for name in names:
        if name in table and table[name].dtype != bool:
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
    for name in integers:
        if name in table:
            numbers = pd.to_numeric(table[name], errors="coerce").astype(float).round()
            table[name] = numbers.where(numbers.abs() < 2**53).astype("Int64")
    return table


def _settings(run: RunDir) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(run.search_yaml.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(settings, dict):
        return {}
    fine, _ = convert_fields(SearchConfig, settings)
    return {name: _as_in_yaml(value) for name, value in fine.items()}


def _as_in_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _prompts(run: RunDir) -> dict[str, Any]:
    try:
        about = json.loads(run.prompts_json.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return about if fits(about, dict[str, Any]) and _says_how_good(about) else {}


def _says_how_good(about: dict[str, Any]) -> bool:
    """Whether the exported prompts' description has what is shown of it."""
    metrics, config = about.get("metrics"), about.get("config")
    return (
        isinstance(metrics, dict)
        and fits(metrics, dict[str, dict[str, float]])
        and not {"test", "valid"}.isdisjoint(metrics)
        and all(fits(about.get(name), int) for name in ("trial", "trained_as"))
        and isinstance(config, dict)
        and fits(config.get("seed"), int)
    )


def _metrics() -> list[str]:
    """All tasks' metrics, each once, the ones that are shown next to the loss first."""
    shown = [task.metric for task in TASKS.values()]
    return list(dict.fromkeys([*shown, *(name for name in OBJECTIVES if name != "loss")]))


def _constants(task: str, data: DataSummary | None, split: str) -> dict[str, float]:
    known = TASKS.get(task)
    if known is None or known.frequencies is None or data is None:
        return {}
    train, rows = data.class_counts.get("train"), data.class_counts.get(split)
    return known.frequencies(train, rows) if train and rows else {}


def _data(search: SearchStarted) -> DataSummary | None:
    try:
        return DataSummary.from_dict(search.data)
    except (AttributeError, TypeError, ValueError):
        return None
