"""Numbers and results in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from tune_app.report.results import Results
from tune_app.run.events import WarmStarted
from tune_app.study.prior import from_json

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
_THREE_DECIMALS = ("loss", "accuracy", "f1", "r2")
# Whole numbers that are names, and so are written without commas.
_NAMES = ("trial", "of", "seed")
# Searched over orders of magnitude, and so shown as powers of ten.
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
    if name in _NAMES:
        return str(int(value))
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
    """The number of trials by status: `12 finished, 2 stopped, 2 diverged`."""
    return ", ".join(f"{amount} {status}" for status, amount in results.counts.items())


def state(results: Results) -> str:
    """The state of the search: running, ended and why, interrupted, or not started."""
    if results.running:
        return f"running, {len(results.searched)} of {results.planned} trials started"
    if results.reason:
        return f"ended: {results.reason}"
    return "interrupted" if len(results.trials) else "not started"


def metrics_of(row: pd.Series, results: Results) -> str:
    """`loss 1.742, accuracy 0.413` of a trial's last report, the objective first."""
    names = (results.objective.name, results.second_metric)
    values = {name: row.get("eval_loss" if name == "loss" else name) for name in names}
    return ", ".join(
        f"{name} {number(value, name)}"
        for name, value in values.items()
        if name == results.objective.name or pd.notna(value)
    )


def baseline_name(trial: int, *, short: bool = False) -> str:
    """The name of a baseline; `short` in tables."""
    if short:
        return "default" if trial == 0 else "default, warmup 1/10"
    return "documented default" if trial == 0 else "default with a warmup of a tenth"


def baselines_in_words(results: Results) -> str:
    """Both baselines' metrics in the search, if there are two; "" otherwise."""
    default = results.default
    if len(results.baselines) < 2 or default is None:
        return ""
    said = []
    for trial in results.baselines:
        row = results.trial(trial)
        assert row is not None  # it is one of the run's trials
        reached = metrics_of(row, results) if pd.notna(row["eval_loss"]) else str(row["status"])
        said.append(f"the {baseline_name(trial)} {reached}")
    return (
        f"In the search (validation, one seed): {'; '.join(said)}. The best config is compared "
        f"with trial {default['trial']}."
    )


def notes(results: Results) -> list[str]:
    """Remarks that belong to an answer, a sentence or two each."""
    warm = "" if results.warm is None else warm_start_in_words(results.warm)
    said = [baselines_in_words(results), warm, *classes_in_words(results)]
    return [line for line in said if line]


def warm_start_in_words(warm: WarmStarted) -> str:
    """What a search has taken over from earlier runs: the configs that run first, and its
    priors."""
    runs = " and ".join(f"{run} ({plural(n, 'trial')})" for run, n in warm.trials.items())
    amount = len(warm.first)
    configs = f"{amount} of their best configs" if amount > 1 else "their best config"
    configs = configs if amount else "none of their configs, which are not of this space"
    priors = "; ".join(f"{name} {from_json(prior)}" for name, prior in warm.priors.items())
    return f"Warm start from {runs}. Run first: {configs}. Expected: {priors or 'nothing'}."


_MOST_CLASSES = 8


def classes_in_words(results: Results) -> list[str]:
    """Rows of each class, and the metrics of always naming the most frequent one, a sentence each;
    [] for tasks without classes and for runs that did not count them."""
    data = results.data
    if data is None or not data.class_counts:
        return []
    train = dict(zip(data.class_names, data.class_counts["train"], strict=True))
    ranked = sorted(train.items(), key=lambda entry: -entry[1])
    said = ", ".join(f"{name} {rows:,}" for name, rows in ranked[:_MOST_CLASSES])
    more = len(ranked) - _MOST_CLASSES
    lines = [f"Training rows by class: {said}{f', and {more} more classes' if more > 0 else ''}."]
    split = "test" if results.evidence is not None else "judged"
    if split not in data.class_counts:
        split = "valid"
    constant = results.constants(split)
    if constant:
        lines.append(
            f"Always naming the most frequent class ({data.constant_answer}): "
            f"{'test' if split == 'test' else 'validation'} loss "
            f"{number(constant['loss'], 'loss')}, accuracy "
            f"{number(constant['accuracy'], 'accuracy')}."
        )
    return lines


def sampled_values(row: pd.Series, results: Results) -> str:
    """`lr 1.2e-2, scheduler cosine`: a trial's values of the searched hyperparameters."""
    values = ((name, row[name]) for name in results.sampled)
    return ", ".join(f"{name} {number(value, name)}" for name, value in values if pd.notna(value))


def trained_by(trial: int, trained_as: int, seed: int) -> str:
    """The training run that a set of prompts comes from."""
    confirmation = "" if trained_as == trial else f"confirmation run {trained_as} of "
    return f"{confirmation}trial {trial}, seed {seed}"


def exported(results: Results) -> str:
    """The exported prompts' own metrics, which `apply --evaluate` reproduces; "" if there are none.

    The verdict's are means over several seeds; these are of the run that was exported.
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


def with_spread(mean: float, spread: float, name: str = "loss") -> str:
    """`1.893 ± 0.029` for a loss over the seeds; only the mean if there was one seed."""
    return number(mean, name) + ("" if pd.isna(spread) else f" ± {spread:.3f}")
