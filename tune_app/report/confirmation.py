"""Is the best config better than the documented default, or was its seed lucky?

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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tune_app.report.evidence import LEVEL, Interval, interval, level_of, next_look
from tune_app.run.run_dir import Status
from tune_app.run.test_rows import pseudo_values
from tune_app.tasks.objectives import LOSS, Objective

CHOOSING_SEEDS = 2  # of each config, where there are several

COLUMNS = [
    "trial",  # the trial of the search that was repeated
    "part",  # "chosen", "baseline" or "other"
    "seeds",  # finished runs that were judged; for an "other", those that chose
    "failed",  # runs that diverged, failed or were interrupted
    "split",  # "test", or "validation" where the runs have no test figures
    "valid",  # mean validation value of the objective over all of its finished runs
    "mean",  # of the objective on `split` over the judged seeds
    "spread",  # standard deviation over the seeds (n - 1); NaN for one seed
    "metric",  # mean of the task's metric on `split`
    "difference",  # of the chosen one: mean over the pairs of its value - the baseline's
    "low",  # the interval of the difference, see evidence.py; NaN for fewer than two pairs
    "high",
    "pairs",
]

_OPEN = (Status.RUNNING, Status.INTERRUPTED)  # not ended

RowsOf = Callable[[int], list[dict[str, float]] | None]  # a run's number -> its test rows


@dataclass(frozen=True)
class Evidence:
    """The result of comparing the chosen config with the baseline.

    gap: the difference of their costs (below zero: the chosen one is better) on `split`
    look: how many times the run's confirmations have been looked at, this one included; 0 for
        runs of before there were looks
    pairs: of finished runs, with the same seed
    started: pairs that were to be trained for this look
    rows: of the test split that the interval allows for; 0: it speaks of the seeds alone
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
class Judged:
    """How far the judging of one config has come.

    look: the latest one that was begun, 0 before the first
    before: pairs that the looks before it had
    due: pairs that it takes
    done: pairs of which both runs have ended, however
    """

    look: int
    before: int
    due: int
    done: int

    @property
    def complete(self) -> bool:
        return self.look > 0 and self.done >= self.due


def runs_of(trials: pd.DataFrame) -> pd.DataFrame:
    """The confirmation runs, by trial and seed; `look` is missing for runs of before."""
    runs = trials[(trials["origin"] == "confirm") & trials["of"].notna()]
    if runs.empty or "seed" not in runs:
        return runs.iloc[:0]
    if "look" not in runs:
        runs = runs.assign(look=pd.NA)
    return runs.sort_values(["of", "seed"], kind="stable")


def choose(runs: pd.DataFrame, candidates: list[int], objective: Objective) -> int | None:
    """The candidate with the most finished runs that choose, and of those the lowest mean
    validation cost; None while one of these runs is missing, or where none has finished."""
    found = []
    for trial in candidates:
        mine = runs[(runs["of"] == trial) & ((runs["look"] == 0) | runs["look"].isna())]
        if len(mine) < CHOOSING_SEEDS or mine["status"].isin(_OPEN).any():
            return None
        finished = mine[(mine["status"] == Status.FINISHED) & mine[objective.column].notna()]
        if len(finished):
            cost = float(finished[objective.column].map(objective.cost).mean())
            found.append((-len(finished), cost, trial))
    return min(found)[2] if found else None


def judged(runs: pd.DataFrame, trial: int, baseline: int, most: int | None) -> Judged:
    """The progress of judging a trial against the baseline.

    most: --confirm-seeds, if known
    """
    mine = runs[(runs["of"] == trial) & (runs["look"] > 0).fillna(False)]
    theirs = runs[(runs["of"] == baseline) & (runs["look"] > 0).fillna(False)]
    if mine.empty:
        return Judged(0, 0, 0, 0)
    look = int(mine["look"].max())
    before = int((mine["look"] < look).sum())
    due = len(mine) if most is None else next_look(before, max(most, before + 1))
    ended = set(mine.loc[~mine["status"].isin(_OPEN), "seed"])
    done = len(ended & set(theirs.loc[~theirs["status"].isin(_OPEN), "seed"]))
    return Judged(look, before, due, done)


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
    tested = objective.test_column in runs and runs[objective.test_column].notna().any()
    column = objective.test_column if tested else objective.column
    if column not in runs:
        return Confirmation(pd.DataFrame(columns=COLUMNS))
    split = "test" if tested else "validation"
    confirmed = [int(of) for of in runs["of"].unique()]
    baseline = next((trial for trial in confirmed if trial in baselines), None)
    candidates = [trial for trial in confirmed if trial not in baselines]
    old = bool(runs["look"].isna().all())
    chosen, looked = _chosen(runs, candidates, baseline, objective, most, old)

    evidence = None
    if chosen is not None and baseline is not None and looked is not None:
        level = LEVEL / len(candidates) if old else level_of(looked.look)
        evidence = _evidence(
            runs, chosen, baseline, looked, level, objective, column, split, rows_of, constant
        )
    table = _table(runs, chosen, baseline, evidence, objective, column, split, metric, old)
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
        mine = runs[(runs["of"] == trial) & (old | (runs["look"] > 0).fillna(False))]
        finished = mine[(mine["status"] == Status.FINISHED) & mine[objective.column].notna()]
        if baseline is None or finished.empty:
            continue
        if old:
            look: Judged | None = Judged(0, 0, len(mine), len(mine))
        else:
            look = _complete(runs, trial, baseline, most)
        cost = float(finished[objective.column].map(objective.cost).mean())
        # A config with fewer seeds, because it diverged or is still running, comes later.
        found.append((look is None, -len(finished) if old else 0, cost, trial, look))
    if found:
        *_, trial, look = min(found, key=lambda entry: entry[:4])
        return trial, look
    if old:
        return None, None
    chosen = choose(runs, candidates, objective) if len(candidates) > 1 else None
    return chosen if chosen is not None else (candidates[0] if len(candidates) == 1 else None), None


def _complete(runs: pd.DataFrame, trial: int, baseline: int, most: int | None) -> Judged | None:
    """The latest look with all of its pairs; None before the first one is complete."""
    state = judged(runs, trial, baseline, most)
    if state.complete:
        return state
    if state.before == 0:
        return None
    mine = runs[(runs["of"] == trial) & (runs["look"] > 0).fillna(False)]
    look = int(mine.loc[mine["look"] < state.look, "look"].max())
    return Judged(look, 0, state.before, state.before)


def _evidence(
    runs: pd.DataFrame,
    chosen: int,
    baseline: int,
    looked: Judged,
    level: float,
    objective: Objective,
    column: str,
    split: str,
    rows_of: RowsOf,
    constant: float | None,
) -> Evidence | None:
    mine, theirs = (
        runs[(runs["of"] == trial) & (runs["look"].isna() | (runs["look"] > 0))].set_index("seed")
        for trial in (chosen, baseline)
    )
    mine = mine.iloc[: looked.due] if looked.look else mine
    good = [
        seed
        for seed in mine.index
        if seed in theirs.index
        and all(
            half.loc[seed, "status"] == Status.FINISHED and pd.notna(half.loc[seed, column])
            for half in (mine, theirs)
        )
    ]
    if not good:
        return None
    mine_S, theirs_S = (
        np.array([objective.cost(float(half.loc[seed, column])) for seed in good])
        for half in (mine, theirs)
    )
    mine_SR, theirs_SR = (
        _by_row([int(half.loc[seed, "trial"]) for seed in good], rows_of, objective)
        for half in (mine, theirs)
    )
    both_SR = None
    if mine_SR is not None and theirs_SR is not None and mine_SR.shape == theirs_SR.shape:
        both_SR = mine_SR - theirs_SR
    means = [float(half.loc[good, column].mean()) for half in (mine, theirs)]
    valid = [
        float(half.loc[good, objective.column].map(objective.cost).mean())
        for half in (mine, theirs)
    ]
    against = None
    if constant is not None and split == "test":
        against = interval(mine_S - objective.cost(constant), mine_SR, level)
    return Evidence(
        trial=chosen,
        baseline=baseline,
        split=split,
        gap=interval(mine_S - theirs_S, both_SR, level),
        look=looked.look,
        pairs=len(good),
        started=len(mine),
        rows=0 if both_SR is None else both_SR.shape[1],
        ahead=valid[0] < valid[1],
        diverged=int((mine["status"] == Status.DIVERGED).sum()),
        value=means[0],
        baseline_value=means[1],
        constant=against,
    )


def _by_row(numbers: list[int], rows_of: RowsOf, objective: Objective) -> np.ndarray | None:
    """The cost of each of these runs by test row, [S, R]; None if it is not known for all."""
    values: list[np.ndarray] = []
    for number in numbers:
        rows = rows_of(number)
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
    objective: Objective,
    column: str,
    split: str,
    metric: str,
    old: bool,
) -> pd.DataFrame:
    figure = f"test_{metric}" if split == "test" else metric
    sign = -1.0 if objective.higher_is_better else 1.0
    rows = []
    for of, group in runs.groupby("of"):
        trial = int(of)
        part = {chosen: "chosen", baseline: "baseline"}.get(trial, "other")
        finished = group[(group["status"] == Status.FINISHED) & group[objective.column].notna()]
        counted = finished
        if not old and part != "other":
            counted = finished[(finished["look"] > 0).fillna(False)]
        values = counted[column].dropna()
        metrics = counted[figure].dropna() if figure in counted else values.iloc[:0]
        row = {
            "trial": trial,
            "part": part,
            "seeds": len(counted),
            "failed": int((~group["status"].isin([Status.FINISHED, Status.RUNNING])).sum()),
            "split": split,
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
