"""What the confirmation trains next: first runs that choose, then looks that judge.

A pure function from a run's results to the runs that are still missing, so that an interrupted
confirmation continues where it stopped. `report/confirmation.py` explains the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from tune_app.report.evidence import next_look
from tune_app.report.judging import CHOOSING_SEEDS, choose, judged, runs_of
from tune_app.report.results import Results
from tune_app.report.verdict import decided
from tune_app.run.run_dir import Status
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig


@dataclass(frozen=True)
class ConfirmRun:
    """A run that is still missing.

    of: the trial that it repeats
    seed_index: 1-based index of its fresh seed; the first two choose, the others judge
    look: 0 if it helps to choose, otherwise the number of the look that it is for
    """

    of: int
    seed_index: int
    look: int
    config: TrialConfig


@dataclass(frozen=True)
class Step:
    """Runs that may train concurrently, and their purpose in words. Without runs, it is the end."""

    runs: tuple[ConfirmRun, ...] = ()
    purpose: str = ""


def next_step(results: Results, config: SearchConfig, *, extend: bool) -> Step:
    """The next step.

    extend: whether there may be another look if the last one was undecided; otherwise, only what
        was started is completed
    """
    best = [int(n) for n in results.finished["trial"] if n not in results.baselines]
    candidates = best[: config.confirm]
    default = results.default
    if not candidates or default is None:
        return Step()
    runs, baseline = runs_of(results.trials), int(default["trial"])
    chosen: int | None = candidates[0]
    if len(candidates) > 1:
        indices = range(1, CHOOSING_SEEDS + 1)
        missing = _missing(results, config, runs, candidates, indices, look=0)
        if missing:
            return Step(missing, f"choosing among the best {len(candidates)} with fresh seeds")
        chosen = choose(runs, candidates, results.objective)
        if chosen is None:  # all of them diverge with other seeds
            return Step()
    assert chosen is not None
    return _judging(results, config, runs, chosen, baseline, extend)


def _judging(
    results: Results,
    config: SearchConfig,
    runs: pd.DataFrame,
    chosen: int,
    baseline: int,
    extend: bool,
) -> Step:
    state = judged(runs, chosen, baseline, config.confirm_seeds)
    # The default's runs are shared by all that it was ever compared with.
    others = runs.loc[~runs["of"].isin(results.baselines), "look"]
    looks = int(others.max()) if others.notna().any() else 0
    if state.look and not state.complete:
        look, due = state.look, state.due
    else:
        if state.look and (not extend or _is_decided(results, chosen)):
            return Step()
        look, due = looks + 1, next_look(state.due, config.confirm_seeds)
        if due == state.due:
            return Step()
    first = CHOOSING_SEEDS + state.before if state.look == look else CHOOSING_SEEDS + state.due
    indices = range(first + 1, CHOOSING_SEEDS + due + 1)
    missing = _missing(results, config, runs, [baseline, chosen], indices, look=look)
    seeds = f"{len(indices)} {'fresh' if look == 1 else 'further'} seeds"
    return Step(missing, f"comparing trial {chosen} with trial {baseline} over {seeds}")


def _is_decided(results: Results, chosen: int) -> bool:
    evidence = results.evidence
    return evidence is not None and evidence.trial == chosen and decided(results) != "undecided"


def _missing(
    results: Results,
    config: SearchConfig,
    runs: pd.DataFrame,
    trials: list[int],
    indices: range,
    look: int,
) -> tuple[ConfirmRun, ...]:
    """Those of the runs that have not ended in any way."""
    ended = runs[~runs["status"].isin([Status.RUNNING, Status.INTERRUPTED])]
    done = set(zip(ended["of"].astype(int), ended["seed"].astype(int), strict=True))
    found = []
    for index in indices:
        for of in trials:
            seed = config.seed + 1000 * index
            if (of, seed) not in done:
                trial = TrialConfig.from_dict({**results.configs[of], "seed": seed})
                found.append(ConfirmRun(of, index, look, trial))
    return tuple(found)
