"""Searches over recorded curves of tasks that the rules of tune_app were not tuned on.

    python -m benchmarks.held_out [--seeds 100] [--processes 2] [TASK ...]
    python -m benchmarks.held_out --bounds [--seeds 100]

The rules for early stopping were chosen with docstrings -> package and SST-2
(benchmarks.sample_efficiency), the sampler with docstrings and raises, and the priors of the
default space come from published settings. This compares them on the other tasks of
benchmarks.curves; of these, smollm2 had a say in whom to stop (README.md). Each way searches with
many seeds, 4 trials at once, and with half as many 1, 8 and 16 at once:

    random               random configs, every trial to its end
    random+ASHA, Ray     with Ray Tune's ASHA as it ships, a rung at the first evaluation
    TPE, GP              plain Optuna, every trial to its end, the first 8 at random
    BOHB, Syne Tune      its searcher and its ASHA as they ship; left out without
                         `pip install syne-tune statsmodels`
    TPE+ASHA             tune_app with --sampler tpe --prior off
    TPE+ASHA+prior       tune_app with --sampler tpe and the default space's prior
    default              tune_app with the default space's prior
    no prior             tune_app with --prior off
    wrong prior          tune_app with a prior that is centred two decades too low
    warm start           tune_app with --warm-start from default searches of 16 trials on two other
                         tasks

Only trials that train to their end count as an answer, and every search runs the documented default
first. Gain: of what the best recorded config is better than the documented default, how much the
best of the first 8, 16 and 32 trials has, mean over the seeds. Tokens: how many times fewer than
random search needs, by median, until a trial ends as well as random search's best of 24; a search
that has not reached that within 32 trials counts with the tokens of 32 full ones. Random search has
ten times as many seeds, because the target is its median: with 40 it is chance which of two configs
it is that end 0.001 apart (deep).

--bounds prints what could be reached at most, with 4 trials at once: by one who knows the best
config from the start, and by random search that stops each trial after its first evaluation unless
it will reach the target.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler

from benchmarks import curves as recorded
from benchmarks.sample_efficiency import RESULTS
from benchmarks.simulated_search import (
    DEMO,
    MOST,
    Curve,
    End,
    Study,
    SyneTune,
    Tool,
    World,
    best_of,
    search,
    tokens_to,
    world,
)
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import evaluation_steps
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.warm_start import EarlierRun, learned
from tune_app.study.prior import NumberPrior, from_json

TARGET, EARLIER, AFTER = 24, 16, (8, 16, MOST)  # trials
PRIOR, WRONG_PRIOR = NumberPrior(5e-3, 3.0), NumberPrior(5e-5, 3.0)  # of search_spaces/default.yaml


def _asha(world: World) -> Any:
    return build_trial_scheduler("asha", world.steps)


def _tpe(world: World, seed: int, prior: NumberPrior | None = None) -> Study:
    return Study(world, seed, "tpe", _asha(world), prior and {"lr": prior})


def _ours(world: World, seed: int, prior: NumberPrior | None = PRIOR) -> Study:
    return Study(world, seed, "gp", _asha(world), prior and {"lr": prior})


def _optunas_gp(world: World, seed: int) -> Study:
    return Study(world, seed, optuna.samplers.GPSampler(seed=seed, n_startup_trials=8), None)


def _ray(world: World, seed: int) -> Study:
    shipped = AsyncHyperBandScheduler(time_attr="evaluation", max_t=len(evaluation_steps(50)) + 1)
    return Study(world, seed, "random", shipped)


def earlier_tasks(name: str) -> list[str]:
    return [task for task in (DEMO, "kind", "code") if task != name][:2]


def _warm(world_: World, seed: int) -> Study:
    runs = []
    for name in earlier_tasks(world_.name):
        other = world(name)
        ends = search(other, _ours(other, seed), 4, EARLIER)
        # Those that were stopped rank behind; the better half has only finished ones.
        ranked = [end.config for end in sorted(ends, key=lambda end: end.loss)]
        stopped = [other.base] * (EARLIER - len(ranked))
        sampled = frozenset(other.space.sampled_names)
        runs.append(EarlierRun(Path(name), (*ranked, *stopped), sampled))
    warm = learned(runs, world_.space, world_.base, AFTER[1])
    priors = {name: from_json(prior) for name, prior in warm.priors.items()}
    return Study(world_, seed, "gp", _asha(world_), priors, warm.first)


WAYS: dict[str, Callable[[World, int], Tool]] = {
    "random": lambda w, seed: Study(w, seed, "random", None),
    "random+ASHA, Ray": _ray,
    "TPE": lambda w, seed: Study(w, seed, "tpe", None),
    "GP": _optunas_gp,
    "BOHB, Syne Tune": SyneTune,
    "TPE+ASHA": _tpe,
    "TPE+ASHA+prior": partial(_tpe, prior=PRIOR),
    "default": _ours,
    "no prior": partial(_ours, prior=None),
    "wrong prior": partial(_ours, prior=WRONG_PRIOR),
    "warm start": _warm,
}
# One in so many seeds, and 4 at once alone.
SLOW = {"GP": 10, "BOHB, Syne Tune": 4}
CHEAP = {"random": 10}  # so many times the seeds


def run(name: str, way: str, at_once: int, seeds: int) -> tuple[str, str, int, list[list[End]]]:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = max(3, seeds // SLOW.get(way, 1)) * CHEAP.get(way, 1)
    return (
        name,
        way,
        at_once,
        [search(world(name), WAYS[way](world(name), seed), at_once) for seed in range(seeds)],
    )


@dataclass(frozen=True)
class Foreseen(World):
    """A world that ends each trial but the default after its first evaluation, unless it will
    reach the target."""

    target: float = 0.0

    def curve(self, config: TrialConfig) -> Curve:
        curve = super().curve(config)
        return curve if config == self.base or curve[-1][0] <= self.target else curve[:1]


def bounds(name: str, seeds: int) -> str:
    """A row: recorded configs that reach the target; full trials that random search needs; and how
    many times fewer those two who know more do."""
    here = world(name)
    asked = (here.base.lr, here.base.scheduler, here.base.num_warmup_steps())
    best = min(here.curves.values(), key=lambda curve: curve[-1][0])

    def searches(known: World) -> list[list[End]]:
        return [search(known, Study(known, seed, "random", None), 4) for seed in range(seeds)]

    plain = searches(here)
    target = statistics.median_high(best_of(ends, TARGET) for ends in plain)

    def needed(found: list[list[End]]) -> float:
        return statistics.median(tokens_to(e, target, MOST * here.full) for e in found) / here.full

    reaching = sum(curve[-1][0] <= target for curve in here.curves.values())
    choosing = {key: curve if key == asked else best for key, curve in here.curves.items()}
    foreseen = Foreseen(here.name, here.curves, here.steps, here.batch_size, here.space, {}, target)
    oracles = (replace(here, curves=choosing, seen={}), foreseen)
    random, *fewest = (needed(found) for found in (plain, *map(searches, oracles)))
    figures = " | ".join(f"{random / trials:.1f}" for trials in fewest)
    return f"| {name} | {reaching} of {len(here.curves)} | {random:.1f} | {figures} |"


def tables(results: dict[tuple[str, str, int], list[list[End]]], names: list[str]) -> list[str]:
    lines = []
    for at_once in sorted({key[2] for key in results}, key=lambda n: (n != 4, n)):
        ways = [way for way in WAYS if (names[0], way, at_once) in results]
        seeds = {way: len(results[names[0], way, at_once]) for way in ways}
        most = statistics.mode(seeds.values())
        said = [way if n == most else f"{way} ({n} seeds)" for way, n in seeds.items()]
        lines += ["", f"## {at_once} concurrent, {most} seeds", ""]
        figures: dict[str, list[float]] = {way: [] for way in ways}
        gains: dict[str, list[list[float]]] = {way: [[] for _ in AFTER] for way in ways}
        for name in names:
            here = world(name)
            plain = results[name, "random", at_once]
            target = statistics.median_high(best_of(ends, TARGET) for ends in plain)
            limit = MOST * here.full
            needed = {
                way: statistics.median(
                    tokens_to(ends, target, limit) for ends in results[name, way, at_once]
                )
                for way in ways
            }
            for way in ways:
                figures[way].append(needed["random"] / needed[way])
                for place, trials in enumerate(AFTER):
                    found = [
                        here.gain(best_of(ends, trials)) for ends in results[name, way, at_once]
                    ]
                    gains[way][place].append(statistics.mean(found))
        lines += [f"| tokens: random / it | {' | '.join(names)} | median |"]
        lines += ["| --- " * (len(names) + 2) + "|"]
        for way, title in zip(ways, said, strict=True):
            row = " | ".join(f"{figure:.1f}" for figure in figures[way])
            lines.append(f"| {title} | {row} | {statistics.median(figures[way]):.1f} |")
        after = "/".join(map(str, AFTER))
        lines += ["", f"| gain after {after} trials, % | {' | '.join(names)} | mean |"]
        lines += ["| --- " * (len(names) + 2) + "|"]
        for way, title in zip(ways, said, strict=True):
            cells = [
                "/".join(f"{100 * gains[way][p][i]:.0f}" for p in range(len(AFTER)))
                for i in range(len(names))
            ]
            mean = "/".join(f"{100 * statistics.mean(g):.0f}" for g in gains[way])
            lines.append(f"| {title} | {' | '.join(cells)} | {mean} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", help="without any, all that were recorded")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bounds", action="store_true", help="print only what could be reached")
    args = parser.parse_args()
    names = args.tasks or [name for name in recorded.read() if name in recorded.HELD_OUT]
    if args.bounds:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        print(
            "| task | configs | random | best config | stopping |\n| --- | --- | --- | --- | --- |"
        )
        for name in names:
            print(bounds(name, args.seeds), flush=True)
        return
    jobs = [
        (name, way, at_once, args.seeds if at_once == 4 else args.seeds // 2)
        for at_once in (4, 1, 8, 16)
        for name in names
        for way in WAYS
        if at_once == 4 or way not in SLOW
    ]
    results: dict[tuple[str, str, int], list[list[End]]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        waiting = deque((job[2], pool.submit(run, *job)) for job in jobs)
        while waiting:
            at_once, future = waiting.popleft()
            try:
                name, way, _, found = future.result()
            except ImportError:  # Syne Tune
                continue
            results[name, way, at_once] = found
            print(name, way, at_once, len(found), flush=True)
            if not any(other == at_once for other, _ in waiting):  # a table is complete
                write(results, names)


def write(results: dict[tuple[str, str, int], list[list[End]]], names: list[str]) -> None:
    counts = ", ".join(f"{name} {len(world(name).curves)}" for name in names)
    lines = [
        f"Recorded configs: {counts}. What the rows are and what is counted: "
        "`benchmarks/held_out.py`.",
        *tables(results, names),
    ]
    (RESULTS / "held_out.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
