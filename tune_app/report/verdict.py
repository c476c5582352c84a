"""The answer of a run: is there a better config than the documented default?

One function decides it; terminal, summary.txt, page, comparison, model card and exit code all show
its answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from tune_app.report.confirmation import Evidence
from tune_app.report.evidence import pairs_needed
from tune_app.report.results import Results
from tune_app.report.words import (
    baseline_name,
    metrics_of,
    number,
    plural,
    signed,
    standing,
    with_spread,
)
from tune_app.run.run_dir import Status
from tune_app.run.search_config import MOST_CONFIRM_SEEDS

Kind = Literal["better", "not better", "undecided", "none"]

# Fewer rows than this can hardly distinguish configs: an accuracy is then only known to 10 points.
_FEW_ROWS = 100


@dataclass(frozen=True)
class Verdict:
    """kind: better: shown by an interval that is wrong in at most 5 % of cases. not better: the
    interval rules out a gain worth having (1 %, or one point of accuracy or F1). undecided:
    neither, or no confirmation. none: no trial has finished.
    """

    kind: Kind
    headline: str
    sentence: str

    @property
    def exit_code(self) -> int:
        """Of a search with this answer: 0 if there is one, whatever it is."""
        return int(self.kind == "none")


def decide(evidence: Evidence, margin: float) -> Kind:
    """What the confirmation shows about the chosen config.

    margin: the smallest difference of costs that counts
    """
    gap, constant = evidence.gap, evidence.constant
    if math.isnan(gap.half):
        return "undecided"
    learned = constant is None or constant.high < 0
    if gap.high < 0 and evidence.ahead and not evidence.diverged and learned:
        return "better"
    if gap.low > -margin or (constant is not None and constant.low > -margin):
        return "not better"
    return "undecided"


def decided(results: Results) -> Kind:
    """The same for a run, whose confirmation may be incomplete."""
    if results.evidence is None:
        return "none" if results.best is None else "undecided"
    return decide(results.evidence, _margin(results, results.evidence))


def _margin(results: Results, evidence: Evidence) -> float:
    return results.objective.margin(evidence.baseline_value)


def verdict(results: Results) -> Verdict:
    """The answer of the run: a headline, and the evidence in plain sentences."""
    if results.best is None:
        return _nothing_finished(results)
    if results.evidence is not None:
        return _confirmed(results, results.evidence)
    return _searched(results)


def _nothing_finished(results: Results) -> Verdict:
    if results.searched.empty:
        text = "No trial has started yet." if results.running else "No trial was started."
        return Verdict("none", "No results yet" if results.running else "No results", text)
    open_trials = results.counts.get(Status.RUNNING, 0)
    headline = "No trial has finished yet" if open_trials else "No trial finished"
    text = f"Of {plural(len(results.searched), 'trial')}: {standing(results)}."
    if not open_trials:
        text += " So there is no answer, no best config and no prompts."
    return Verdict("none", headline, text)


def _searched(results: Results) -> Verdict:
    """The answer without a confirmation, or before it: each config had one seed."""
    best, default = results.best, results.default
    assert best is not None
    if results.finished.empty or default is None:
        return Verdict("undecided", "No answer yet", "The documented default has not run.")
    first = results.finished[~results.finished["trial"].isin(results.baselines)]
    name = baseline_name(int(default["trial"]))
    if first.empty:
        return Verdict(
            "undecided",
            "Only the documented default has finished",
            f"It reaches {metrics_of(best, results)}; there is nothing to compare it with"
            + (" yet." if results.running else "."),
        )
    best = first.iloc[0]
    reached = f"Trial {best['trial']} reaches {metrics_of(best, results)} on the validation split"
    if default["status"] != Status.FINISHED or pd.isna(default["eval_loss"]):
        state = str(default["status"])
        if default["status"] not in (Status.DIVERGED, Status.FAILED):
            state = f"is {state}"
        return Verdict(
            "undecided",
            f"Trial {best['trial']} is best so far"
            if results.running
            else "Nothing to compare with",
            f"{reached}; the documented default {state}, so there is nothing to compare with.",
        )
    objective = results.objective
    change = float(best[objective.column] - default[objective.column])
    ahead = objective.cost(best[objective.column]) < objective.cost(default[objective.column])
    text = (
        f"{reached}, the {name} {metrics_of(default, results)}: "
        f"a difference of {signed(change)}. Each was trained with one seed, "
        f"{'so part of it may be luck' if ahead else 'which is too few to rule out a gain'}."
    )
    if not results.running:
        text += " A confirmation (--confirm) would show."
    headline = "Too close to tell"
    if results.running:
        headline = (
            f"Trial {best['trial']} is ahead of the default"
            if ahead
            else ("No trial is ahead of the default")
        )
    return Verdict("undecided", headline, text + _few_rows(results, "validation"))


def _confirmed(results: Results, evidence: Evidence) -> Verdict:
    objective, table = results.objective, results.confirm.set_index("trial")
    kind = decided(results)
    mine, theirs = table.loc[evidence.trial], table.loc[evidence.baseline]
    name, second = objective.name, results.second_metric
    reached = f"a mean {evidence.split} {name} of {_mean(mine, name)}"
    if pd.notna(mine["metric"]):
        reached += f" ({second} {number(mine['metric'], second)})"
    text = (
        f"Trained again with {plural(evidence.pairs, 'fresh seed')}, trial {evidence.trial} "
        f"reaches {reached}, the {baseline_name(evidence.baseline)} {_mean(theirs, name)}: "
        f"a paired difference of {signed(mine['difference'])}"
    )
    if pd.notna(mine["low"]):
        text += f" (95% interval {signed(mine['low'])} to {signed(mine['high'])})"
    text += "."
    if evidence.diverged:
        text += f" {plural(evidence.diverged, 'run')} of trial {evidence.trial} diverged."
    if kind == "undecided" and evidence.gap.high < 0 and not evidence.ahead:
        text += " On the validation split, however, the default is better."
    elif kind == "undecided":
        text += f" {_needed(results, evidence)}"
    elif kind == "not better" and evidence.gap.low <= 0:
        worth = objective.margin(evidence.baseline_value)
        text += f" A gain of more than {number(worth, name)} is ruled out."
    text += _against_constant(results, evidence)
    text += _few_rows(results, evidence.split)
    return Verdict(kind, _headline(kind, evidence), text)


def _headline(kind: Kind, evidence: Evidence) -> str:
    if kind == "better":
        return f"Trial {evidence.trial} is better than the default"
    if evidence.constant is not None and evidence.constant.mean >= 0:
        return "Nothing beats always naming the most frequent class"
    return "No better than the default" if kind == "not better" else "Too close to tell"


def _mean(row: pd.Series, name: str) -> str:
    return with_spread(row["mean"], row["spread"], name)


def _needed(results: Results, evidence: Evidence) -> str:
    """What it would take to decide, if the standard deviations stay the same."""
    gap = evidence.gap
    distance = max(-gap.mean, gap.mean + _margin(results, evidence))
    if evidence.constant is not None and gap.high < 0:
        gap, distance = evidence.constant, abs(evidence.constant.mean)
    if math.isnan(gap.half):
        return "One pair of runs is too few to rule out luck."
    seeds = pairs_needed(gap, evidence.pairs, evidence.look, distance, MOST_CONFIRM_SEEDS)
    if seeds is not None:
        return f"About {seeds} fresh seeds would decide it (--confirm-seeds {seeds})."
    if evidence.rows and gap.row_half > gap.seed_half:
        # Half of the squared width for the rows, the other half for the seeds.
        rows = evidence.rows * 2 * (gap.row_half / distance) ** 2
        return (
            f"More seeds alone would not decide it: {evidence.rows} test rows are too few for a "
            f"difference of this size. About {_rounded(rows)} would be enough."
        )
    most = f"{MOST_CONFIRM_SEEDS} seeds"
    return f"For a difference of this size, even {most} could not rule out luck."


def _rounded(amount: float) -> str:
    digits = 10 ** max(0, math.floor(math.log10(amount)) - 1)
    return f"{math.ceil(amount / digits) * digits:,}"


def _against_constant(results: Results, evidence: Evidence) -> str:
    """Whether it beats a constant answer; "" if it clearly does, or if that is not known."""
    if evidence.constant is None or evidence.constant.high < 0:
        return ""
    name = results.objective.name
    value = number(results.constants("test").get(name), name)
    verb = "does not beat" if evidence.constant.mean >= 0 else "is not clearly better than"
    return f" It {verb} always naming the most frequent class ({name} {value})."


def _few_rows(results: Results, split: str) -> str:
    data = results.data
    if data is None:
        return ""
    rows = data.rows.get("test", 0) if split == "test" else data.judged
    if not 0 < rows < _FEW_ROWS:
        return ""
    text = f" It rests on {plural(rows, 'row')} of the {split} split"
    if results.metric != "accuracy":
        return f"{text}, which is few."
    points = math.ceil(100 * 0.98 / math.sqrt(rows))  # 1.96 standard errors at one half
    return f"{text}; with so few, an accuracy is known to {points} points at best."
