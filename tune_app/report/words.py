"""Numbers and findings in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from tune_app.report.results import Results
from tune_app.run.run_dir import Status

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
_THREE_DECIMALS = ("loss", "accuracy", "r2")
# Searched over orders of magnitude, so read as powers of ten.
LOGARITHMIC = ("lr", "weight_decay", "eps", "lr_end")


def number(value: Any, name: str = "") -> str:
    """A value as people write it: 1.2e-2 for a learning rate, three decimals for a loss."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return "; ".join(changes_in_words(value))
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    value = float(value)
    if value == 0:
        return "0.000" if name.endswith(_THREE_DECIMALS) else "0"
    if name in LOGARITHMIC or abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if name.endswith(_THREE_DECIMALS):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    if name.endswith("perplexity"):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    if value == int(value):
        return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def signed(value: float) -> str:
    """A difference of losses with its sign."""
    return f"{MINUS if value < 0 else '+'}{abs(value):.3f}"


def count(amount: float) -> str:
    """A large count in short: 940, 12.3 k, 4.1 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(amount) >= limit:
            return f"{amount / (1e3 if unit == ' k' else limit):.3g}{unit}"
    return f"{amount:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as 8.4 s, 3 min 5 s or 2 h 14 min."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def plural(amount: int, noun: str) -> str:
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def standing(results: Results) -> str:
    """How many trials stand how: `12 finished, 2 stopped, 2 diverged`."""
    return ", ".join(f"{amount} {status}" for status, amount in results.counts.items())


def state(results: Results) -> str:
    """How far the search is: running, ended and why, cut off or not started."""
    if results.running:
        return f"running, {len(results.searched)} of {results.planned} trials started"
    if results.reason:
        return f"ended: {results.reason}"
    return "cut off" if len(results.trials) else "not started"


def figures(row: pd.Series, metric: str) -> str:
    """`loss 1.742, accuracy 0.413` of a trial's last report."""
    text = f"loss {number(row['eval_loss'], 'loss')}"
    value = row.get(metric)
    return text if value is None or pd.isna(value) else f"{text}, {metric} {number(value, metric)}"


def sampled_values(row: pd.Series, results: Results) -> str:
    """`lr 1.2e-2, scheduler cosine`: what the search chose for a trial."""
    values = ((name, row[name]) for name in results.sampled)
    return ", ".join(f"{name} {number(value, name)}" for name, value in values if pd.notna(value))


def trained_by(trial: int, trained_as: int, seed: int) -> str:
    """Which training made a set of prompts."""
    confirmation = "" if trained_as == trial else f"confirmation run {trained_as} of "
    return f"{confirmation}trial {trial}, seed {seed}"


def exported(results: Results) -> str:
    """The exported prompts' own figures, which `apply --evaluate` gives again; "" without any.

    The verdict's figures are means over several seeds; these are of the one run that was exported.
    """
    about = results.prompts
    if not about:
        return ""
    split = "test" if "test" in about["metrics"] else "valid"
    values = ", ".join(
        f"{name} {number(value, name)}" for name, value in about["metrics"][split].items()
    )
    made = trained_by(about["trial"], about["trained_as"], about["config"]["seed"])
    return f"Exported prompts: {'validation' if split == 'valid' else split} {values} ({made})."


def changes_by_step(changes: Iterable[Sequence[Any]]) -> list[tuple[str, str]]:
    """TrialConfig.changes as pairs such as (`after step 12`, `lr 9.6e-3, scheduler cosine`)."""
    found: dict[int, list[str]] = {}
    for step, name, value in changes:
        found.setdefault(step, []).append(f"{name} {number(value, name)}")
    return [(f"after step {step}", ", ".join(values)) for step, values in found.items()]


def changes_in_words(changes: Iterable[Sequence[Any]]) -> list[str]:
    """`after step 12: lr 9.6e-3, scheduler cosine` for each step of TrialConfig.changes."""
    return [f"{when}: {what}" for when, what in changes_by_step(changes)]


@dataclass(frozen=True)
class Verdict:
    """Whether the best config is better than the documented default.

    proven: a confirmation's 95 % interval lies below zero. likely: lower in the search, where each
    config had one seed. no: not better, by either. open: nothing to compare yet.
    """

    kind: Literal["proven", "likely", "no", "open"]
    headline: str
    sentence: str


def verdict(results: Results) -> Verdict:
    """The answer of the run in one plain sentence."""
    best, default = results.best, results.default
    if best is None:
        return _nothing_finished(results)
    if len(results.confirm) > 1:
        confirmed = _confirmed(results, int(best["trial"]))
        if confirmed is not None:
            return confirmed
    is_default = best["trial"] == 0
    others = len(results.finished) - 1
    if is_default and others == 0:
        return Verdict(
            "open",
            "Only the documented default has finished",
            f"It reaches {figures(best, results.metric)}; there is nothing to compare it with yet.",
        )
    if is_default:
        return Verdict(
            "no",
            "No better than the default",
            f"The documented default reaches {figures(best, results.metric)}; "
            f"none of {plural(others, 'other finished trial')} did better.",
        )
    trial = f"Trial {best['trial']}"
    if default is None or default["status"] != Status.FINISHED or pd.isna(default["eval_loss"]):
        state = "has not run" if default is None else f"is {default['status']}"
        if default is not None and default["status"] in (Status.DIVERGED, Status.FAILED):
            state = str(default["status"])
        return Verdict(
            "open",
            f"{trial} is best so far" if results.running else f"{trial} is best",
            f"{trial} reaches {figures(best, results.metric)}; "
            f"the documented default {state}, so there is no figure to compare with.",
        )
    difference = best["eval_loss"] - default["eval_loss"]
    share = abs(difference) / abs(default["eval_loss"]) if default["eval_loss"] else 0.0
    return Verdict(
        "likely",
        f"{trial} is ahead of the default",
        f"{trial} reaches {figures(best, results.metric)} on the validation split, the documented "
        f"default {figures(default, results.metric)}: {signed(difference)} ({share:.1%} lower). "
        "Each had one seed, so part of it may be luck.",
    )


def _nothing_finished(results: Results) -> Verdict:
    if results.searched.empty:
        text = "No trial has started yet." if results.running else "No trial was started."
        return Verdict("open", "No results yet" if results.running else "No results", text)
    open_trials = results.counts.get(Status.RUNNING, 0)
    headline = "No trial has finished yet" if open_trials else "No trial finished"
    return Verdict(
        "open", headline, f"Of {plural(len(results.searched), 'trial')}: {standing(results)}."
    )


def _confirmed(results: Results, best: int) -> Verdict | None:
    """The verdict of the confirmation; None while the default or the winner lacks finished runs."""
    rows = results.confirm.set_index("trial")
    if best not in rows.index or rows.loc[best, "seeds"] == 0:
        return None
    row = rows.loc[best]
    seeds, split = plural(int(row["seeds"]), "fresh seed"), row["split"]
    reached = (
        f"on the {split} split it reaches a mean loss of {with_spread(row['mean'], row['spread'])}"
    )
    if pd.notna(row["metric"]):
        reached += f" ({results.metric} {number(row['metric'], results.metric)})"
    if best == 0:
        return Verdict(
            "no",
            "No better than the default",
            f"Trained again with {seeds}, the documented default has a lower validation loss than "
            f"{plural(len(rows) - 1, 'other config')}; {reached}.",
        )
    if row["pairs"] == 0:
        return None
    default = rows.loc[0]
    compared = (
        f"Trained again with {seeds}, trial {best} has the lowest validation loss; {reached}, the "
        f"documented default {with_spread(default['mean'], default['spread'])}: "
        f"a paired difference of {signed(row['difference'])}"
    )
    if row["difference"] >= 0:
        return Verdict("no", "No better than the default", f"{compared}.")
    if pd.isna(row["high"]):
        return Verdict(
            "likely",
            f"Trial {best} is ahead of the default",
            f"{compared}. One pair of runs is too few to tell it from luck.",
        )
    compared += f" (95% interval {signed(row['low'])} to {signed(row['high'])})"
    if row["high"] < 0:
        return Verdict("proven", f"Trial {best} is better than the default", f"{compared}.")
    return Verdict(
        "no",
        "No better than the default",
        f"{compared}, which {plural(int(row['pairs']), 'pair')} of runs cannot tell from luck.",
    )


def with_spread(mean: float, spread: float) -> str:
    """`1.893 ± 0.029` of a loss over the seeds; the mean alone where there was one seed."""
    return number(mean, "loss") + ("" if pd.isna(spread) else f" ± {spread:.3f}")
