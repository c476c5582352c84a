"""Which confirmation runs choose the best config, which judge it, and how far they have come."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from tune_app.report.evidence import next_look
from tune_app.run.run_dir import Status
from tune_app.tasks.objectives import Objective

CHOOSING_SEEDS = 2  # of each config, where there are several
_OPEN = (Status.RUNNING, Status.INTERRUPTED)  # not ended


@dataclass(frozen=True)
class Judged:
    """How far the judging of one config has come.

    look: the latest one that was begun, 0 before the first
    before: pairs that the previous looks had
    due: pairs that it needs
    done: pairs of which both runs have ended in any way
    """

    look: int
    before: int
    due: int
    done: int

    @property
    def complete(self) -> bool:
        return self.look > 0 and self.done >= self.due


def runs_of(trials: pd.DataFrame) -> pd.DataFrame:
    """The confirmation runs, by trial and seed; `look` is missing for runs from before looks."""
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
        finished = finished_runs(mine, objective)
        if len(finished):
            found.append((-len(finished), mean_cost(finished, objective), trial))
    return min(found)[2] if found else None


def judging_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Those that judge; runs from before there were looks are not among them."""
    return runs[(runs["look"] > 0).fillna(False)]


def finished_runs(runs: pd.DataFrame, objective: Objective) -> pd.DataFrame:
    return runs[(runs["status"] == Status.FINISHED) & runs[objective.column].notna()]


def mean_cost(runs: pd.DataFrame, objective: Objective) -> float:
    """Mean validation cost."""
    return float(runs[objective.column].map(objective.cost).mean())


def judged(runs: pd.DataFrame, trial: int, baseline: int, most: int | None) -> Judged:
    """The progress of judging a trial against the baseline.

    most: --confirm-seeds, if known
    """
    judging = judging_runs(runs)
    mine, theirs = judging[judging["of"] == trial], judging[judging["of"] == baseline]
    if mine.empty:
        return Judged(0, 0, 0, 0)
    look = int(mine["look"].max())
    before = int((mine["look"] < look).sum())
    due = len(mine) if most is None else next_look(before, max(most, before + 1))
    ended = set(mine.loc[~mine["status"].isin(_OPEN), "seed"])
    done = len(ended & set(theirs.loc[~theirs["status"].isin(_OPEN), "seed"]))
    return Judged(look, before, due, done)


def latest_complete(
    runs: pd.DataFrame, trial: int, baseline: int, most: int | None
) -> Judged | None:
    """The latest look with all of its pairs; None before the first one is complete."""
    state = judged(runs, trial, baseline, most)
    if state.complete:
        return state
    if state.before == 0:
        return None
    mine = judging_runs(runs[runs["of"] == trial])
    look = int(mine.loc[mine["look"] < state.look, "look"].max())
    return Judged(look, 0, state.before, state.before)
