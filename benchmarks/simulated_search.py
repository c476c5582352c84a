"""A search in which only the training is simulated: trials read their losses off recorded curves.

Sampler and trial scheduler are the very objects that a search uses, or those of another tool, and
each running trial advances by one evaluation in turn.

Between two recorded learning rates, curves are interpolated, or a whole basin around each recorded
one would have the very same loss: a sampler that follows a slope would find none.

    python -m benchmarks.simulated_search   compares this with taking the nearest recorded config
"""

from __future__ import annotations

import csv
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from statistics import mean
from typing import Any, Protocol

import optuna
import yaml

from benchmarks import curves as recorded
from benchmarks.sample_efficiency import RESULTS, Key, StubTrial
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.run.trial_report import OBJECTIVE, Report, evaluation_steps
from tune_app.search.study_trials import StudyTrials
from tune_app.search.trial_job import TrialJob
from tune_app.study.prior import Prior
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space

MOST = 32  # trials of a search
DEMO = "docstrings"  # the task that rules were tuned on: to learn from, not to be judged

Curve = list[tuple[float, int]]  # (loss, tokens so far) at each evaluation


@dataclass(frozen=True)
class World:
    """A task's curves, by config."""

    name: str
    curves: dict[Key, Curve]
    steps: int
    batch_size: int
    space: SearchSpace
    seen: dict[Key, Curve] = field(default_factory=dict)

    def curve(self, config: TrialConfig) -> Curve:
        asked = (config.lr, config.scheduler, config.num_warmup_steps())
        if asked not in self.seen:
            self.seen[asked] = curve_at(asked, self.curves)
        return self.seen[asked]

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


def curve_at(asked: Key, curves: Mapping[Key, Curve]) -> Curve:
    """The curve of a config: that of the nearest recorded schedule and warmup, interpolated between
    the recorded learning rates on both sides, on a logarithmic scale. Where only one side is
    recorded, or one of the two diverged, it is the nearest one's."""
    nearest = min(curves, key=partial(_distance, asked))
    alike = [key for key in curves if key[1:] == nearest[1:]]
    below = max((key for key in alike if key[0] <= asked[0]), default=nearest)
    above = min((key for key in alike if key[0] >= asked[0]), default=nearest)
    low, high = curves[below], curves[above]
    if below == above or len(low) != len(high):
        return curves[nearest]
    share = math.log(asked[0] / below[0]) / math.log(above[0] / below[0])
    return [
        (one + share * (other - one), round(tokens + share * (more - tokens)))
        for (one, tokens), (other, more) in zip(low, high, strict=True)
    ]


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
    """A sampler with one of Ray Tune's trial schedulers, as tune_app has them.

    The documented default lies outside of these spaces. Our own sampler learns from it all the
    same; for Optuna's it is no trial of the study, because with a trial without parameters in it,
    GP learns nothing.
    """

    def __init__(
        self,
        world: World,
        seed: int,
        sampler: str | optuna.samplers.BaseSampler,
        stopper: Any,
        priors: Mapping[str, Prior] | None = None,
        first: Sequence[TrialConfig] = (),
    ) -> None:
        study, base = optuna.create_study(), world.base
        self.knows_default = sampler == "gp"
        for number, trial in enumerate(world.space.first_trials(base, None, first)):
            if trial.origin == "warm_start" or (number == 0 and self.knows_default):
                trial.enqueue(study)
        if isinstance(sampler, str):
            sampler = build_sampler(sampler, world.space.expecting(priors or {}), seed)
        study.sampler = sampler
        self.trials = StudyTrials(study, world.space, base, RunDir("."), stop=lambda: False)
        self.stopper, self.base, self.began = stopper, base, self.knows_default
        self.before = 0 if self.knows_default else 1  # trials that the study does not know of
        if stopper is not None:
            stopper.set_search_properties(OBJECTIVE, "min")

    def ask(self) -> tuple[StubTrial | None, TrialConfig]:
        if not self.began:
            self.began = True
            return None, self.base
        job = self.trials.ask()
        assert isinstance(job, TrialJob)
        trial = StubTrial(replace(job, number=job.number + self.before))
        if self.stopper is not None:
            self.stopper.on_trial_add(None, trial)
        return trial, job.config

    def report(self, trial: StubTrial | None, at: int, report: Report, *, last: bool) -> bool:
        if trial is None:
            return not last
        result, number = report.flat() | {"evaluation": at + 1}, trial.job.number - self.before
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


def best_of(ends: Iterable[End], trials: int) -> float:
    return min((end.loss for end in ends if end.trial < trials), default=math.inf)


def tokens_to(ends: list[End], target: float, most: int) -> int:
    return min((end.tokens for end in ends if end.loss <= target), default=most)


def halfway(name: str) -> tuple[int, float, float]:
    """How many recorded configs have a learning rate between two others that were recorded, and the
    mean errors of their last losses if only those others are known: of the nearest, and
    interpolated. Only where all three losses are below that of a guess (the median config)."""
    curves = world(name).curves
    middle = sorted(curve[-1][0] for curve in curves.values())[len(curves) // 2]
    nearest, between = [], []
    for key in curves:
        alike = sorted(other for other in curves if other[1:] == key[1:])
        place = alike.index(key)
        if not 0 < place < len(alike) - 1:
            continue
        sides = [alike[place - 1], alike[place + 1]]
        loss, *losses = (curves[k][-1][0] for k in (key, *sides))
        if max(loss, *losses) > middle:
            continue
        known = {side: curves[side] for side in sides}
        nearest.append(mean(abs(loss - other) for other in losses))
        between.append(abs(loss - curve_at(key, known)[-1][0]))
    return len(nearest), mean(nearest), mean(between)


def main() -> None:
    print("| task | configs | error of the nearest | interpolated |\n| --- | --- | --- | --- |")
    for name in (DEMO, *(name for name in recorded.read() if name in recorded.HELD_OUT)):
        count, nearest, between = halfway(name)
        print(f"| {name} | {count} | {nearest:.3f} | {between:.3f} |")


if __name__ == "__main__":
    main()
