"""What tells earliest how a trial will end: rank correlations on the recorded curves.

    python -m benchmarks.earlier_verdicts                  the correlations, in a second
    python -m benchmarks.earlier_verdicts --searches 30    and searches judged at two fifths instead

Takes the curves of benchmarks.curves, without those that diverged, and of the demo task those of
benchmarks.sample_efficiency, which have evaluations alone. The searches are those of
benchmarks.held_out, 4 trials at once, in which the worst quarter ends at the rung.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import optuna
from scipy.stats import spearmanr

from benchmarks import curves as recorded
from benchmarks.held_out import AFTER, PRIOR, TARGET
from benchmarks.simulated_search import DEMO, MOST, Study, World, best_of, search, tokens_to, world
from tune_app.run.trial_report import evaluation_steps
from tune_app.search.ray_tune.schedulers import Asha


@dataclass(frozen=True)
class Curve:
    """One config's five evaluations."""

    whole: list[float]
    few: list[float]  # over 16 rows; NaN where only `whole` is known, as in the other lists
    trained: list[float]  # training loss since the evaluation before
    averaged: list[float]


VERDICTS: dict[str, Callable[[Curve], float]] = {
    "2/5: the last evaluation": lambda c: c.whole[1],
    "the last evaluation + training loss": lambda c: c.whole[1] + c.trained[1],
    "the lowest evaluation so far": lambda c: min(c.whole[:2]),
    "the mean of both evaluations": lambda c: c.whole[0] + c.whole[1],
    "training loss alone": lambda c: c.trained[1],
    "a line, half an interval on": lambda c: c.whole[1] + 0.5 * (c.whole[1] - c.whole[0]),
    "a line, to the end": lambda c: c.whole[1] + 3 * (c.whole[1] - c.whole[0]),
    "averaged prompts": lambda c: c.averaged[1],
    "the last evaluation on 16 rows": lambda c: c.few[1],
    "3/5: the last evaluation": lambda c: c.whole[2],
    "the last evaluation + training loss (3/5)": lambda c: c.whole[2] + c.trained[2],
    "the lowest evaluation so far (3/5)": lambda c: min(c.whole[:3]),
}


def curves_of(name: str) -> list[Curve]:
    if name == DEMO:
        unknown = [math.nan] * 5
        losses = [[loss for loss, _ in curve] for curve in world(name).curves.values()]
        return [Curve(loss, unknown, unknown, unknown) for loss in losses if len(loss) == 5]
    return [
        Curve(
            [p.loss for p in points],
            [p.parts[0] for p in points],
            [p.train_loss for p in points],
            [p.averaged for p in points],
        )
        for points in recorded.read()[name].values()
        if len(points) == 5
    ]


def correlation(name: str, verdict: Callable[[Curve], float]) -> float:
    """Spearman's, of the verdict with the final loss; NaN where it cannot be told."""
    curves = curves_of(name)
    judged = [verdict(curve) for curve in curves]
    if any(map(math.isnan, judged)):
        return math.nan
    return float(spearmanr(judged, [curve.whole[-1] for curve in curves]).statistic)


def rung_at(evaluation: int) -> Asha:
    return Asha(lambda steps: evaluation_steps(steps)[evaluation - 1])


def judged_by(name: str, verdict: Callable[[Curve], float]) -> World:
    """The task's world, whose second evaluation says the verdict."""
    here = world(name)
    if name == DEMO:
        unknown = [math.nan] * 5
        known = {
            key: Curve([x for x, _ in c], unknown, unknown, unknown)
            for key, c in here.curves.items()
        }
    else:
        known = {
            key: Curve([p.loss for p in c], [], [p.train_loss for p in c], [])
            for key, c in recorded.read()[name].items()
        }
    curves = {
        key: [
            (verdict(known[key]) if at == 1 and len(curve) == 5 else loss, tokens)
            for at, (loss, tokens) in enumerate(curve)
        ]
        for key, curve in here.curves.items()
    }
    return replace(here, curves=curves, seen={})


def searches(name: str, seeds: int) -> None:
    here = world(name)
    ways = {
        "3/5, the last evaluation (the default)": (here, 3),
        "2/5, the last evaluation": (here, 2),
        "2/5, the lowest so far": (judged_by(name, lambda c: min(c.whole[:2])), 2),
    }
    if name != DEMO:
        mean = judged_by(name, lambda c: (c.whole[1] + c.trained[1]) / 2)
        ways["2/5, evaluation + training loss"] = (mean, 2)
    plain = [search(here, Study(here, seed, "random", None), 4) for seed in range(seeds)]
    target = statistics.median_high(best_of(ends, TARGET) for ends in plain)

    def needed(found: list) -> float:
        return statistics.median(tokens_to(ends, target, MOST * here.full) for ends in found)

    for way, (where, at) in ways.items():
        found = [
            search(where, Study(where, seed, "tpe", rung_at(at), {"lr": PRIOR}), 4)
            for seed in range(seeds)
        ]
        gains = [
            f"{100 * statistics.mean(here.gain(best_of(ends, trials)) for ends in found):.0f}"
            for trials in AFTER
        ]
        print(
            f"{name:10}  {way:38}  tokens: random / it {needed(plain) / needed(found):.2f}, "
            f"gain {'/'.join(gains)} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--searches", type=int, default=0, metavar="SEEDS")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [*(name for name in recorded.read() if name in recorded.HELD_OUT), DEMO]
    print(f"| | {' | '.join(names)} | mean |")
    print("| --- " * (len(names) + 2) + "|")
    for title, verdict in VERDICTS.items():
        found = [correlation(name, verdict) for name in names]
        cells = ["\N{EN DASH}" if math.isnan(value) else f"{value:.2f}" for value in found]
        print(f"| {title} | {' | '.join(cells)} | {np.nanmean(found):.2f} |")
    for name in names if args.searches else []:
        searches(name, args.searches)


if __name__ == "__main__":
    main()
