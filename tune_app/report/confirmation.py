"""Is the best config better than the documented default, or was it just a lucky seed?

After a search the best few configs are each trained again with two fresh seeds, and the one with
the lowest mean validation cost is *chosen*. Then the chosen one and the default are *judged*: both
are trained with further seeds, which had no part in the choice, and compared on the test split. So
the comparison is not biased by having chosen among several configs.

Runs with the same seed see the same data in the same order, with the same initial prompts if their
prompt lengths are equal. So they are compared in pairs, which removes most of the seed's noise.
`evidence.py` says how many pairs are trained, and how certain a difference is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tune_app.report.evidence import LEVEL, Interval, interval, level_of
from tune_app.report.judging import (
    Judged,
    choose,
    finished_runs,
    judging_runs,
    latest_complete,
    mean_cost,
    runs_of,
)
from tune_app.run.run_dir import Status
from tune_app.run.test_rows import pseudo_values
from tune_app.tasks.objectives import LOSS, Objective

COLUMNS = [
    "trial",  # the trial of the search that was repeated
    "part",  # "chosen", "baseline" or "other"
    "seeds",  # finished runs that were judged; for an "other", those that chose
    "failed",  # runs that diverged, failed or were interrupted
    "split",  # "test", or "validation" if the runs have no test metrics
    "valid",  # mean validation value of the objective over all of its finished runs
    "mean",  # of the objective on `split` over the judged seeds
    "spread",  # standard deviation over the seeds (n - 1); NaN for one seed
    "metric",  # mean of the task's metric on `split`
    "difference",  # of the chosen one: mean over the pairs of its value - the baseline's
    "low",  # the interval of the difference, see evidence.py; NaN for fewer than two pairs
    "high",
    "pairs",
]

RowsOf = Callable[[int], list[dict[str, float]] | None]  # a run's number -> its test rows


@dataclass(frozen=True)
class Evidence:
    """The result of comparing the chosen config with the baseline.

    gap: the difference of their costs (below zero: the chosen one is better) on `split`
    look: how many times the run's confirmations have been looked at, this one included; 0 for
        runs from before there were looks
    pairs: of finished runs, with the same seed
    started: pairs that were planned for this look
    rows: test rows that the interval allows for; 0 if it allows only for the seeds
    ahead: whether the chosen one has the lower mean validation cost in the same runs too
    diverged: runs of the chosen one that diverged
    value, baseline_value: means of the objective on `split`
    constant: the difference of costs from always giving the same answer; None where that is unknown
    """

    trial: int
    baseline: int
    split: str
    gap: Interval
    look: int
    pairs: int
    started: int
    rows: int
    ahead: bool
    diverged: int
    value: float
    baseline_value: float
    constant: Interval | None = None


@dataclass(frozen=True)
class Confirmation:
    """table: a row for each confirmed trial, the chosen one first, then the baseline; COLUMNS."""

    table: pd.DataFrame
    evidence: Evidence | None = None
    chosen: int | None = None


@dataclass(frozen=True)
class _Compared:
    """What runs are compared by: the objective, as the column of its values on a split."""

    objective: Objective
    column: str
    split: str

    @classmethod
    def of(cls, runs: pd.DataFrame, objective: Objective) -> _Compared:
        """By the test split if the runs have it; runs of a search without one do not."""
        if objective.test_column in runs and runs[objective.test_column].notna().any():
            return cls(objective, objective.test_column, "test")
        return cls(objective, objective.column, "validation")


def confirmation(
    trials: pd.DataFrame,
    baselines: list[int],
    metric: str,
    *,
    objective: Objective = LOSS,
    most: int | None = None,
    rows_of: RowsOf = lambda run: None,
    constant: float | None = None,
) -> Confirmation:
    """The confirmation so far.

    baselines: the trials that may be compared with; the one that was confirmed is used
    most: --confirm-seeds
    constant: the objective's value on the test split of always giving the same answer
    """
    runs = runs_of(trials)
    if runs.empty:
        return Confirmation(pd.DataFrame(columns=COLUMNS))
    compared = _Compared.of(runs, objective)
    if compared.column not in runs:
        return Confirmation(pd.DataFrame(columns=COLUMNS))
    confirmed = [int(of) for of in runs["of"].unique()]
    baseline = next((trial for trial in confirmed if trial in baselines), None)
    candidates = [trial for trial in confirmed if trial not in baselines]
    old = bool(runs["look"].isna().all())
    chosen, looked = _chosen(runs, candidates, baseline, objective, most, old)

    evidence = None
    if chosen is not None and baseline is not None and looked is not None:
        level = LEVEL / len(candidates) if old else level_of(looked.look)
        evidence = _evidence(runs, chosen, baseline, looked, level, compared, rows_of, constant)
    table = _table(runs, chosen, baseline, evidence, compared, metric, old)
    return Confirmation(table, evidence, chosen)


def _chosen(
    runs: pd.DataFrame,
    candidates: list[int],
    baseline: int | None,
    objective: Objective,
    most: int | None,
    old: bool,
) -> tuple[int | None, Judged | None]:
    """The config that the answer is about, and its latest complete look.

    If several were judged (an extended search may have another best config), it is the one with the
    lowest mean validation cost: each has spent its own part of LEVEL.
    """
    found = []
    for trial in candidates:
        mine = runs[runs["of"] == trial]
        mine = mine if old else judging_runs(mine)
        finished = finished_runs(mine, objective)
        if baseline is None or finished.empty:
            continue
        if old:
            look: Judged | None = Judged(0, 0, len(mine), len(mine))
        else:
            look = latest_complete(runs, trial, baseline, most)
        cost = mean_cost(finished, objective)
        # A config with fewer seeds, because it diverged or is still running, comes later.
        found.append((look is None, -len(finished) if old else 0, cost, trial, look))
    if found:
        *_, trial, look = min(found, key=lambda entry: entry[:4])
        return trial, look
    if old:
        return None, None
    chosen = choose(runs, candidates, objective) if len(candidates) > 1 else None
    return chosen if chosen is not None else (candidates[0] if len(candidates) == 1 else None), None


def _evidence(
    runs: pd.DataFrame,
    chosen: int,
    baseline: int,
    looked: Judged,
    level: float,
    compared: _Compared,
    rows_of: RowsOf,
    constant: float | None,
) -> Evidence | None:
    objective, column = compared.objective, compared.column
    judging = runs[runs["look"].isna() | (runs["look"] > 0)]
    mine, theirs = (
        judging[judging["of"] == trial].set_index("seed") for trial in (chosen, baseline)
    )
    mine = mine.iloc[: looked.due] if looked.look else mine
    started, diverged = len(mine), int((mine["status"] == Status.DIVERGED).sum())
    seeds = [seed for seed in mine.index if _has_value(mine, seed, column)]
    seeds = [seed for seed in seeds if _has_value(theirs, seed, column)]
    if not seeds:
        return None
    mine, theirs = mine.loc[seeds], theirs.loc[seeds]
    mine_S, theirs_S = (
        one[column].map(objective.cost).to_numpy(dtype=float) for one in (mine, theirs)
    )
    mine_SR, theirs_SR = (_by_row(one["trial"], rows_of, objective) for one in (mine, theirs))
    both_SR = None
    if mine_SR is not None and theirs_SR is not None and mine_SR.shape == theirs_SR.shape:
        both_SR = mine_SR - theirs_SR
    against = None
    if constant is not None and compared.split == "test":
        against = interval(mine_S - objective.cost(constant), mine_SR, level)
    return Evidence(
        trial=chosen,
        baseline=baseline,
        split=compared.split,
        gap=interval(mine_S - theirs_S, both_SR, level),
        look=looked.look,
        pairs=len(seeds),
        started=started,
        rows=0 if both_SR is None else both_SR.shape[1],
        ahead=mean_cost(mine, objective) < mean_cost(theirs, objective),
        diverged=diverged,
        value=float(mine[column].mean()),
        baseline_value=float(theirs[column].mean()),
        constant=against,
    )


def _has_value(runs: pd.DataFrame, seed: int, column: str) -> bool:
    """Whether the run with this seed has finished, and with a value. `runs`: by seed."""
    if seed not in runs.index:
        return False
    return bool(runs.loc[seed, "status"] == Status.FINISHED and pd.notna(runs.loc[seed, column]))


def _by_row(numbers: Iterable[int], rows_of: RowsOf, objective: Objective) -> np.ndarray | None:
    """The cost of each of these runs by test row, [S, R]; None if it is not known for all."""
    values: list[np.ndarray] = []
    for number in numbers:
        rows = rows_of(int(number))
        if rows is None or len(rows) < 2:
            return None
        try:
            values.append(pseudo_values(rows, objective.value))
        except (KeyError, ZeroDivisionError):  # the task counts nothing for this objective
            return None
    if len({len(run) for run in values}) != 1:
        return None
    values_SR = np.array(values)
    return -values_SR if objective.higher_is_better else values_SR


def _table(
    runs: pd.DataFrame,
    chosen: int | None,
    baseline: int | None,
    evidence: Evidence | None,
    compared: _Compared,
    metric: str,
    old: bool,
) -> pd.DataFrame:
    objective = compared.objective
    shown = f"test_{metric}" if compared.split == "test" else metric
    sign = -1.0 if objective.higher_is_better else 1.0
    rows = []
    for of, group in runs.groupby("of"):
        trial = int(of)
        part = {chosen: "chosen", baseline: "baseline"}.get(trial, "other")
        finished = finished_runs(group, objective)
        counted = finished if old or part == "other" else judging_runs(finished)
        values = counted[compared.column].dropna()
        metrics = counted[shown].dropna() if shown in counted else values.iloc[:0]
        row = {
            "trial": trial,
            "part": part,
            "seeds": len(counted),
            "failed": int((~group["status"].isin([Status.FINISHED, Status.RUNNING])).sum()),
            "split": compared.split,
            "valid": float(finished[objective.column].mean()),
            "mean": float(values.mean()) if len(values) else math.nan,
            "spread": float(values.std()) if len(values) > 1 else math.nan,
            "metric": float(metrics.mean()) if len(metrics) else math.nan,
            "difference": math.nan,
            "low": math.nan,
            "high": math.nan,
            "pairs": 0,
        }
        if evidence is not None and part == "chosen":
            gap = evidence.gap
            low, high = sorted((sign * gap.low, sign * gap.high))
            row |= {"difference": sign * gap.mean, "low": low, "high": high}
            row["pairs"] = evidence.pairs
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    order = table["part"].map({"chosen": 0, "baseline": 1, "other": 2})
    cost = table["valid"].map(objective.cost)
    keys = pd.DataFrame({"part": order, "failed": table["failed"], "cost": cost})
    return table.loc[keys.sort_values(["part", "failed", "cost"]).index].reset_index(drop=True)
