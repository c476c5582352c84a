"""The tables of `benchmarks.prompt_quality`, made of the runs that it has kept."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import Any

import pandas as pd

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "demo": "the demo model"}
DEFAULT = {"init": "normal", "lr": 1e-3, "warmup_steps": 60, "prompt_length": 8, "steps": 60}
FAIR = DEFAULT | {"warmup_steps": 6}
WORDS = FAIR | {"init": "vocab"}


def report(runs: pd.DataFrame) -> str:
    """The results as Markdown."""
    parts = [
        "# How good prompts get\n\nMade by `python -m benchmarks.prompt_quality --tables` from "
        "`prompt_quality.csv`; what each column is: "
        "[README](../README.md#how-good-prompts-get)."
    ]
    for model, name in MODELS.items():
        of_model = runs[(runs["model"] == model) & (runs["tuning_mode"] == "ptune")]
        if of_model.empty:
            continue
        parts.append(f"## {name[0].upper()}{name[1:]}")
        parts.append(_decisive(of_model))
        parts += [_rates(of_model), _shapes(of_model), _searches(of_model)]
        parts.append(_deep(runs[(runs["model"] == model) & (runs["tuning_mode"] == "deep_ptune")]))
    return "\n\n".join(part for part in parts if part) + "\n"


def of(runs: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The runs with these values, by seed."""
    for name, value in values.items():
        runs = runs[runs[name] == value]
    return runs.sort_values("seed")


def found(runs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each task the config with the lowest validation loss, seed 0, in as many steps as the
    documented default."""
    tried = of(runs, seed=0, tuning_mode="ptune", steps=DEFAULT["steps"])
    best = tried.loc[tried.groupby("task")["valid_loss"].idxmin()]
    return {row["task"]: {n: row[n] for n in DEFAULT} for row in best.to_dict("records")}


def _decisive(runs: pd.DataFrame) -> str:
    """The documented default against itself with a fair warmup, with words, and what was found."""
    rows, best = [], found(runs)
    for task in runs["task"].unique():
        default = of(runs, task=task, **DEFAULT)
        tried = len(of(runs, task=task, seed=0, steps=DEFAULT["steps"]))
        for label, config in (
            ("the documented default", DEFAULT),
            ("the same, warmup a tenth", FAIR),
            ("words, warmup a tenth", WORDS),
            (f"the best of {tried} on the validation rows", best.get(task, DEFAULT)),
        ):
            those = of(runs, task=task, **config)
            if label.startswith("the best"):  # of seed 0, with which it was chosen
                label += f": {config['init']}, lr {_rate(config['lr'])}"
                label += f", {config['prompt_length']} tokens"
                those = those[those["seed"] > 0]
            if those.empty or (label.startswith("the best") and config == DEFAULT):
                continue
            both = those.merge(default, on="seed", suffixes=("", "_default"))
            cells = [
                task,
                label,
                str(len(those)),
                _mean(those["valid_loss"]),
                _mean(those["valid_accuracy"]),
                _mean(those["test_loss"]),
                _mean(those["test_accuracy"]),
            ]
            for metric in ("test_loss", "test_accuracy"):
                same = config == DEFAULT
                cells.append("" if same else _interval(both[metric] - both[f"{metric}_default"]))
            rows.append(cells)
    header = [
        *("task", "config", "seeds", "valid loss", "valid accuracy", "test loss", "test accuracy"),
        *("test loss, less the default's", "test accuracy, less the default's"),
    ]
    return (
        "Means over seeds; differences are paired by seed, with the 95 % interval of a t test.\n\n"
        + _table(header, rows)
    )


def _rates(runs: pd.DataFrame) -> str:
    """Learning rate by start, seed 0, 8 prompt tokens, 60 steps, warmup of a tenth."""
    chosen = of(runs, seed=0, warmup_steps=6, prompt_length=8, steps=60)
    if chosen["lr"].nunique() < 2:
        return ""
    rows = []
    for task, init in itertools.product(
        chosen["task"].unique(), ("normal", "vocab", "text", "labels")
    ):
        found = of(chosen, task=task, init=init)
        if found.empty:
            continue
        cells = [_pair(of(found, lr=lr)) for lr in sorted(chosen["lr"].unique())]
        rows.append([task, init, *cells])
    header = ["task", "init", *map(_rate, sorted(chosen["lr"].unique()))]
    return "Learning rate by start: validation loss / accuracy, seed 0 alone.\n\n" + _table(
        header, rows
    )


def _shapes(runs: pd.DataFrame) -> str:
    """Prompt length and steps, from words at lr 1e-3."""
    chosen = of(runs, seed=0, init="vocab", lr=1e-3)
    chosen = chosen[chosen["warmup_steps"] * 10 == chosen["steps"]]
    shapes = sorted(set(zip(chosen["prompt_length"], chosen["steps"], strict=True)))
    if len(shapes) < 2:
        return ""
    rows = [
        [task, *(_pair(of(chosen, task=task, prompt_length=p, steps=s)) for p, s in shapes)]
        for task in chosen["task"].unique()
    ]
    header = ["task", *(f"{p} tokens, {s} steps" for p, s in shapes)]
    return (
        "Prompt length and steps, from words at lr 1e-3: validation loss / accuracy, seed 0 alone."
        "\n\n" + _table(header, rows)
    )


def _deep(runs: pd.DataFrame) -> str:
    """Deep prompts that begin as noise or as nothing."""
    if runs.empty:
        return ""
    rates = sorted(runs["lr"].unique())
    rows = [
        [task, init, *(_pair(of(runs, task=task, deep_init=init, lr=lr)) for lr in rates)]
        for task in runs["task"].unique()
        for init in ("normal", "zero")
    ]
    return (
        "Deep prompts (deep_ptune), learning rate by deep_init: validation loss / accuracy, mean "
        "of two seeds.\n\n" + _table(["task", "deep_init", *map(_rate, rates)], rows)
    )


def _rate(lr: float) -> str:
    return f"{lr:.0e}".replace("e-0", "e-")


def _searches(runs: pd.DataFrame) -> str:
    """What the best of so many configs reaches, where configs begin as normal only, and as all."""
    rows = []
    for task in runs["task"].unique():
        tried = of(runs, task=task, seed=0, prompt_length=8, steps=60)
        before, after = tried[tried["init"] == "normal"], tried
        k = min(4, len(before))
        if k < 2 or len(after) <= len(before):
            continue
        default = of(tried, **DEFAULT)
        rows.append(
            [
                task,
                str(k),
                f"{default['test_accuracy'].iloc[0]:.3f}" if len(default) else "",
                _best_of(before, k),
                _best_of(after, k),
            ]
        )
    header = ["task", "configs", "documented default", "best of normal", "best of all starts"]
    return (
        "Test accuracy of the config with the lowest validation loss among that many drawn from "
        "the runs above: mean over all draws, seed 0.\n\n" + _table(header, rows)
        if rows
        else ""
    )


def _best_of(runs: pd.DataFrame, k: int) -> str:
    pairs = sorted(zip(runs["valid_loss"], runs["test_accuracy"], strict=True))
    # The i-th best is the best of k draws in C(n - 1 - i, k - 1) of the C(n, k) sets.
    n = len(pairs)
    weights = [math.comb(n - 1 - i, k - 1) / math.comb(n, k) for i in range(n)]
    return f"{sum(w * accuracy for w, (_, accuracy) in zip(weights, pairs, strict=True)):.3f}"


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}"


def _interval(differences: Iterable[float]) -> str:
    """Mean and 95 % interval of Student's t; the value alone where there is one seed."""
    values = list(differences)
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f} (one seed)"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def _pair(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    return f"{runs['valid_loss'].mean():.3f} / {runs['valid_accuracy'].mean():.3f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
