"""Searches over recorded curves of tasks that no rule of tune_app was tuned on.

    python -m benchmarks.held_out [--seeds 100] [--processes 2] [TASK ...]

The rules for early stopping and the priors of the default space were chosen with docstrings ->
package and SST-2 (benchmarks.sample_efficiency), or come from published settings. The tasks of
benchmarks.curves are held against them here. Each way searches with many seeds, 4 trials at once,
and with fewer seeds 1 and 8 at once:

    random               random configs, every trial to its end
    random+ASHA, Ray     with Ray Tune's ASHA as it ships, a rung at the first evaluation
    TPE, GP              plain Optuna, every trial to its end
    BOHB, Syne Tune      its searcher and its ASHA as they ship (`pip install syne-tune`; else left
                         out)
    TPE+ASHA             tune_app without a prior
    default              tune_app with the default space's prior
    wrong prior          tune_app with a prior that is centred two decades too low
    warm start           tune_app with --warm-start from default searches of 16 trials on two other
                         tasks

Only trials that train to their end count as an answer, and every search runs the documented default
first. Gain: of what the best recorded config is better than the documented default, how much the
best of the first 8, 16 and 32 trials has, mean over the seeds. Tokens: how many times fewer than
random search needs, by median, until a trial ends as well as random search's best of 24; a search
that has not reached that within 32 trials counts with the tokens of 32 full ones.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import optuna
import yaml
from ray.tune.schedulers import AsyncHyperBandScheduler

from benchmarks import curves as recorded
from benchmarks.sample_efficiency import RESULTS, Key, StubTrial
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.run.trial_report import OBJECTIVE, Report, evaluation_steps
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.study_trials import StudyTrials
from tune_app.search.trial_job import TrialJob
from tune_app.search.warm_start import EarlierRun, learned
from tune_app.study.prior import NumberPrior, Prior, from_json, with_priors
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space

MOST, TARGET, EARLIER, AFTER = 32, 24, 16, (8, 16, 32)  # trials
PRIOR, WRONG_PRIOR = NumberPrior(5e-3, 3.0), NumberPrior(5e-5, 3.0)  # of search_spaces/default.yaml
DEMO = "docstrings"  # the task that rules were tuned on: to learn from, not to be judged


@dataclass(frozen=True)
class World:
    """A task's curves: (loss, tokens) at each evaluation of each config."""

    name: str
    curves: dict[Key, list[tuple[float, int]]]
    steps: int
    batch_size: int
    space: SearchSpace
    seen: dict[Key, Key] = field(default_factory=dict)

    def curve(self, config: TrialConfig) -> list[tuple[float, int]]:
        """That of the config, or of the nearest one that was recorded."""
        asked = (config.lr, config.scheduler, config.num_warmup_steps())
        if asked not in self.seen:
            self.seen[asked] = min(self.curves, key=partial(_distance, asked))
        return self.curves[self.seen[asked]]

    @property
    def base(self) -> TrialConfig:
        return SearchConfig(steps=self.steps, batch_size=self.batch_size).base_trial()

    @property
    def full(self) -> int:
        """Tokens of a whole trial."""
        return max(curve[-1][1] for curve in self.curves.values())

    @property
    def best(self) -> float:
        return min(curve[-1][0] for curve in self.curves.values())

    def gain(self, loss: float) -> float:
        default = self.curve(self.base)[-1][0]
        return (default - loss) / (default - self.best)


def _distance(one: Key, other: Key) -> tuple[bool, float]:
    return one[1] != other[1], abs(math.log10(one[0] / other[0])) + abs(one[2] - other[2]) / 50


@cache
def world(name: str) -> World:
    if name == DEMO:
        demo: dict[Key, list[tuple[float, int]]] = {}
        for row in csv.DictReader((RESULTS / "curves.csv").open()):
            key = (float(row["lr"]), row["scheduler"], int(row["warmup_steps"]))
            demo.setdefault(key, []).append((float(row["objective"]), int(row["tokens"])))
        return World(name, demo, 50, 8, load_space(str(RESULTS / "space.yaml")))
    task, known = recorded.TASKS[name], recorded.read()[name]
    found = {key: [(point.loss, point.tokens) for point in curve] for key, curve in known.items()}
    warmup = max(task.warmups)
    parameters = {
        "lr": {"space": "loguniform", "lower": min(task.lrs), "upper": max(task.lrs)},
        "scheduler": {"space": "choice", "categories": list(task.schedulers)},
        "warmup_steps": {"space": "qrandint", "lower": 0, "upper": warmup, "q": warmup},
    }
    file = RESULTS / f".{name}.yaml"
    file.write_text(yaml.safe_dump({"parameters": parameters}))
    space = load_space(str(file))
    file.unlink(missing_ok=True)
    return World(name, found, task.steps, task.batch_size, space)


class Tool(Protocol):
    """What a simulated search asks."""

    def ask(self) -> tuple[Any, TrialConfig]: ...

    def report(self, trial: Any, at: int, report: Report, *, last: bool) -> bool:
        """Takes a report in; whether the trial goes on."""


class Study:
    """Optuna's samplers with Ray Tune's trial schedulers, as tune_app has them.

    The documented default, which lies outside of these spaces, is no trial of the study: GP learns
    nothing beside a trial without parameters.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        sampler: str,
        stopper: Any,
        priors: Mapping[str, Prior] | None = None,
        first: Sequence[TrialConfig] = (),
    ) -> None:
        study, base = optuna.create_study(), world.base
        for trial in world.space.first_trials(base, None, first):
            if trial.origin == "warm_start":
                trial.enqueue(study)
        expected = world.space.expecting(priors or {})
        study.sampler = with_priors(build_sampler(sampler, seed), expected, seed)
        self.trials = StudyTrials(study, world.space, base, RunDir("."), stop=lambda: False)
        self.stopper, self.base, self.began = stopper, base, False
        if stopper is not None:
            stopper.set_search_properties(OBJECTIVE, "min")

    def ask(self) -> tuple[StubTrial | None, TrialConfig]:
        if not self.began:
            self.began = True
            return None, self.base
        job = self.trials.ask()
        assert isinstance(job, TrialJob)
        trial = StubTrial(replace(job, number=job.number + 1))  # number 0 is the default's
        if self.stopper is not None:
            self.stopper.on_trial_add(None, trial)
        return trial, job.config

    def report(self, trial: StubTrial | None, at: int, report: Report, *, last: bool) -> bool:
        if trial is None:
            return not last
        result, number = report.flat() | {"evaluation": at + 1}, trial.job.number - 1
        self.trials.report(number, report)
        decision = "CONTINUE"
        if self.stopper is not None:
            decision = self.stopper.on_trial_result(None, trial, result)
        if last or decision == "STOP":
            self.trials.end(number, report)
            if self.stopper is not None:
                self.stopper.on_trial_complete(None, trial, result)
            return False
        return True


class SyneTune:
    """Its BOHB as it ships; the documented default runs first here too."""

    def __init__(self, world: World, seed: int) -> None:
        from syne_tune.backend.trial_status import Trial
        from syne_tune.config_space import choice, loguniform
        from syne_tune.optimizer.baselines import BOHB

        lr, scheduler, warmup = (p.distribution for p in world.space.parameters)
        self.known = {
            "lr": loguniform(lr.low, lr.high),
            "scheduler": choice(list(scheduler.choices)),
            "warmup_steps": choice(list(range(warmup.low, warmup.high + 1, warmup.step))),
        }
        self.made, self.world, self.count = Trial, world, 0
        self.bohb = BOHB(
            self.known,
            metric=OBJECTIVE,
            time_attr="evaluation",
            max_t=len(evaluation_steps(world.steps)),
            random_seed=seed,
            points_to_evaluate=[],
        )

    def ask(self) -> tuple[Any, TrialConfig]:
        from datetime import datetime

        self.count += 1
        if self.count == 1:
            return None, self.world.base
        config = self.bohb.suggest().config
        trial = self.made(self.count, config, datetime(2000, 1, 1))
        self.bohb.on_trial_add(trial)
        return trial, TrialConfig.from_dict(config, self.world.base)

    def report(self, trial: Any, at: int, report: Report, *, last: bool) -> bool:
        if trial is None:
            return not last
        result = {OBJECTIVE: report.objective, "evaluation": at + 1}
        decision = self.bohb.on_trial_result(trial, result)
        if last:
            self.bohb.on_trial_complete(trial, result)
        return not last and decision == "CONTINUE"


@dataclass(frozen=True)
class End:
    """A trial that trained to its last step, and the tokens of all trials until then."""

    trial: int
    loss: float
    tokens: int
    config: TrialConfig


def search(world: World, tool: Tool, at_once: int, most: int = MOST) -> list[End]:
    """One search, each running trial advancing by one evaluation in turn."""
    steps = evaluation_steps(world.steps)
    running: deque[tuple[int, Any, TrialConfig, int]] = deque()
    ends, spent, asked = [], 0, 0
    while asked < most or running:
        while len(running) < at_once and asked < most:
            running.append((asked, *tool.ask(), 0))
            asked += 1
        number, trial, config, at = running.popleft()
        curve = world.curve(config)
        loss, tokens = curve[at]
        spent += tokens - (curve[at - 1][1] if at else 0)
        last = at + 1 == len(curve)
        diverged = last and len(curve) < len(steps)
        report = Report(step=steps[at], eval_loss=loss, objective=loss, diverged=diverged)
        if tool.report(trial, at, report, last=last):
            running.append((number, trial, config, at + 1))
        elif last and not diverged:
            ends.append(End(number, loss, spent, config))
    return ends


def _asha(world: World) -> Any:
    return build_trial_scheduler("asha", world.steps)


def _ours(world: World, seed: int, prior: NumberPrior | None = None) -> Study:
    return Study(world, seed, "tpe", _asha(world), prior and {"lr": prior})


def _ray(world: World, seed: int) -> Study:
    shipped = AsyncHyperBandScheduler(time_attr="evaluation", max_t=len(evaluation_steps(50)) + 1)
    return Study(world, seed, "random", shipped)


def earlier_tasks(name: str) -> list[str]:
    return [task for task in (DEMO, "kind", "code") if task != name][:2]


def _warm(world_: World, seed: int) -> Study:
    runs = []
    for name in earlier_tasks(world_.name):
        other = world(name)
        ends = search(other, _ours(other, seed, PRIOR), 4, EARLIER)
        # Those that were stopped rank behind; the better half has only finished ones.
        ranked = [end.config for end in sorted(ends, key=lambda end: end.loss)]
        stopped = [other.base] * (EARLIER - len(ranked))
        sampled = frozenset(other.space.sampled_names)
        runs.append(EarlierRun(Path(name), (*ranked, *stopped), sampled))
    warm = learned(runs, world_.space, world_.base, AFTER[1])
    priors = {name: from_json(prior) for name, prior in warm.priors.items()}
    return Study(world_, seed, "tpe", _asha(world_), priors, warm.first)


WAYS: dict[str, Callable[[World, int], Tool]] = {
    "random": lambda w, seed: Study(w, seed, "random", None),
    "random+ASHA, Ray": _ray,
    "TPE": lambda w, seed: Study(w, seed, "tpe", None),
    "GP": lambda w, seed: Study(w, seed, "gp", None),
    "BOHB, Syne Tune": SyneTune,
    "TPE+ASHA": _ours,
    "default": partial(_ours, prior=PRIOR),
    "wrong prior": partial(_ours, prior=WRONG_PRIOR),
    "warm start": _warm,
}
SLOW = {"GP": 10, "BOHB, Syne Tune": 4}  # one in so many seeds, and 4 at once alone


def run(name: str, way: str, at_once: int, seeds: int) -> tuple[str, str, int, list[list[End]]]:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = max(3, seeds // SLOW.get(way, 1))
    return (
        name,
        way,
        at_once,
        [search(world(name), WAYS[way](world(name), seed), at_once) for seed in range(seeds)],
    )


def best_of(ends: Iterable[End], trials: int) -> float:
    return min((end.loss for end in ends if end.trial < trials), default=math.inf)


def tokens_to(ends: list[End], target: float, most: int) -> int:
    return min((end.tokens for end in ends if end.loss <= target), default=most)


def tables(results: dict[tuple[str, str, int], list[list[End]]], names: list[str]) -> list[str]:
    lines = []
    for at_once in sorted({key[2] for key in results}, key=lambda n: (n != 4, n)):
        ways = [way for way in WAYS if (names[0], way, at_once) in results]
        seeds = {way: len(results[names[0], way, at_once]) for way in ways}
        most = max(seeds.values())
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
    args = parser.parse_args()
    names = args.tasks or list(recorded.read())
    jobs = [
        (name, way, at_once, args.seeds if at_once == 4 else args.seeds // 4)
        for at_once in (4, 1, 8)
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
