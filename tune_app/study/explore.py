"""What population-based training tries next, and which searches it supports. Imports no Ray."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import CHANGEABLE, TrialConfig
from tune_app.run.trial_report import evaluation_steps
from tune_app.study.space import SearchSpace

# The defaults of Ray's PopulationBasedTraining.
_RESAMPLE_PROBABILITY = 0.25
_FACTORS = (0.8, 1.2)

_MIN_TRIALS = 4  # a quarter of them is replaced
_ATTEMPTS = 100


def check_population(config: SearchConfig, space: SearchSpace) -> list[str]:
    """Why this search cannot use a population; [] if it can."""
    flag, messages = "--scheduler pbt", []
    if config.trials < _MIN_TRIALS:
        messages.append(f"--trials: {flag} needs {_MIN_TRIALS} or more, got {config.trials}.")
    if config.concurrency is not None and config.concurrency < config.trials:
        messages.append(
            f"--concurrency: with {flag} all {config.trials} trials train concurrently, got "
            f"{config.concurrency}; leave it out."
        )
    if space.python is not None:
        messages.append(
            f"--space: {flag} needs a YAML space, because the conditions of a Python space are "
            "not known."
        )
    elif not set(space.sampled_names) & set(CHANGEABLE):
        messages.append(
            f"--space: {flag} needs a parameter that can change while a trial trains "
            f"({', '.join(CHANGEABLE)}); got only {', '.join(space.sampled_names)}."
        )
    base = config.base_trial()
    steps = {first.config.steps for first in space.first_trials(base, config.trial)}
    if "steps" in space.sampled_names or len(steps) > 1:
        messages.append(f"--space: with {flag} all trials must have the same number of steps.")
    elif len(evaluation_steps(steps.pop())) < 2:
        messages.append(f"--steps: {flag} compares trials while they train, so it needs 2 or more.")
    return messages


def explore(
    config: TrialConfig, step: int, space: SearchSpace, base: TrialConfig, rng: random.Random
) -> TrialConfig:
    """A config that equals `config` for `step` steps, then a neighbour of it in the space.

    Neighbours are chosen as in Ray: each parameter is redrawn with a probability of 1/4, otherwise
    multiplied by 0.8 or 1.2, or moved to the next value of its list. Non-numeric choices have no
    neighbour and keep their value. Bounds and conditions hold; parameters that a condition excludes
    are set as in `base` (SearchConfig.base_trial()).
    """
    now = config.at(step - 1)
    changes = [change for change in config.changes if change[0] < step]
    for _ in range(_ATTEMPTS):
        new = TrialConfig.from_dict(_neighbour(now, space, base, rng), now)
        if new != now and not new.check():
            changes += [
                (step, name, getattr(new, name))
                for name in CHANGEABLE
                if getattr(new, name) != getattr(now, name)
            ]
            break
    return replace(config, changes=tuple(changes))


def _neighbour(
    now: TrialConfig, space: SearchSpace, base: TrialConfig, rng: random.Random
) -> dict[str, Any]:
    values: dict[str, Any] = {}  # of the active parameters
    changed: dict[str, Any] = {}
    for parameter in space.parameters:  # parents first
        name = parameter.name
        if not parameter.active(values):
            changed[name] = getattr(base, name)
            continue
        values[name] = getattr(now, name)
        if name in CHANGEABLE:
            values[name] = _moved(parameter.distribution, values[name], rng)
            changed[name] = values[name]
    if "warmup_steps" in changed:
        changed["warmup_ratio"] = None  # it takes precedence over warmup_steps
    return {name: value for name, value in changed.items() if name in CHANGEABLE}


def _moved(distribution: BaseDistribution, value: Any, rng: random.Random) -> Any:
    anew = rng.random() < _RESAMPLE_PROBABILITY
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        if anew or value not in choices:
            return rng.choice(choices)
        if isinstance(value, str | bool) or value is None:
            return value
        place = choices.index(value) + rng.choice((-1, 1))
        return choices[min(max(place, 0), len(choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, grid = distribution.low, distribution.high, distribution.step
    if anew or value is None:
        moved = _drawn(distribution, rng)
    else:
        factor = rng.choice(_FACTORS)
        moved = value * factor
        if grid and abs(moved - value) < grid:  # it would be rounded back
            moved = value + math.copysign(grid, factor - 1)
    moved = min(max(moved, low), high)
    if grid:
        moved = low + round((moved - low) / grid) * grid
    return round(moved) if isinstance(distribution, IntDistribution) else moved


def _drawn(distribution: FloatDistribution | IntDistribution, rng: random.Random) -> float:
    low, high = distribution.low, distribution.high
    if distribution.log:
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    if distribution.step:
        return low + distribution.step * rng.randint(0, round((high - low) / distribution.step))
    return rng.uniform(low, high)
