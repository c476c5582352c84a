"""Priors: where good values of a parameter are expected before any trial has run.

A prior never restricts the space. With Optuna's samplers, a third of the first trials are drawn
from it, the others from the whole space, and its share then shrinks (`share`), so a wrong prior
costs only a few trials. What the sampler `gp` does with it is in gaussian_process.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tune_app.run.typed import convert_fields
from tune_app.study.parameter import at_share, on_steps
from tune_app.study.space import SearchSpace, origin_of

# Trials drawn before the sampler starts to model: as `build_sampler` has it.
_FIRST_TRIALS = 8
# On the recorded curves a half gains no more than a third if the prior is right, and costs more if
# it is wrong (benchmarks/README.md).
_FIRST_SHARE = 1 / 3
# What a prior that is fitted to earlier runs leaves open.
_LEAST_SPREAD = 1 / 8  # of a parameter's range
_LEAST_WEIGHT = 1 / 4  # of all choices together


@dataclass(frozen=True)
class NumberPrior:
    """A normal distribution, cut off at the parameter's bounds.

    spread: standard deviation, in the parameter's unit; for a logarithmic parameter a factor above
        1 (3: two thirds of the draws are between center / 3 and center * 3)
    """

    center: float
    spread: float

    def sample(self, distribution: BaseDistribution, rng: np.random.Generator) -> float | int:
        """A value of the distribution, within its bounds and on its steps."""
        return self.at(rng.random(), distribution)

    def at(self, quantile: float, distribution: BaseDistribution) -> float | int:
        """The value below which that share of the draws is."""
        from scipy.special import ndtr, ndtri  # importing it takes a third of a second

        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high = float(distribution.low), float(distribution.high)
        center, spread = self.center, self.spread
        if distribution.log:
            low, high, center, spread = np.log([low, high, center, spread])
        # Inverse of the distribution function between the bounds: no draw is rejected.
        first, last = ndtr((np.array([low, high]) - center) / spread)
        if last > first:
            value = center + spread * float(ndtri(first + (last - first) * quantile))
        else:  # the prior is so far outside that both bounds have the same probability in floats
            value = low if center < low else high
        return on_steps(distribution, float(np.exp(value)) if distribution.log else value)

    def __str__(self) -> str:
        return f"around {self.center:.3g}, spread {self.spread:.3g}"


@dataclass(frozen=True)
class ChoicePrior:
    """How often each choice is drawn, relative to the others."""

    weights: Mapping[Any, float]

    def sample(self, distribution: BaseDistribution, rng: np.random.Generator) -> Any:
        """One of the distribution's choices."""
        return self.at(rng.random(), distribution)

    def at(self, quantile: float, distribution: BaseDistribution) -> Any:
        """The choice at that share of the weights, in the order of the choices."""
        assert isinstance(distribution, CategoricalDistribution)
        weights = np.array([self.weights.get(choice, 0.0) for choice in distribution.choices])
        upper = np.cumsum(weights / weights.sum())
        upper /= upper[-1]
        return distribution.choices[int(np.searchsorted(upper, quantile, side="right"))]

    def __str__(self) -> str:
        return ", ".join(f"{choice} {weight:.2g}" for choice, weight in self.weights.items())


Prior = NumberPrior | ChoicePrior


def value_at(quantile: float, distribution: BaseDistribution, prior: Prior | None = None) -> Any:
    """The value at that quantile of the prior; without one all values are equally likely, on the
    parameter's scale."""
    if prior is not None:
        return prior.at(quantile, distribution)
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(quantile * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is None or distribution.log:
        if isinstance(distribution, FloatDistribution):
            return at_share(distribution, quantile)
        low, high = math.log(distribution.low - 0.5), math.log(distribution.high + 0.5)
        return on_steps(distribution, math.exp(low + quantile * (high - low)))
    count = round((distribution.high - distribution.low) / distribution.step) + 1
    return on_steps(distribution, distribution.low + int(quantile * count) * distribution.step)


def fitted(values: Sequence[tuple[Any, float]], distribution: BaseDistribution) -> Prior:
    """The prior that (value, weight) pairs speak for; the values lie in the distribution.

    Weights count as parts of one run. A few values that agree are no reason to look nowhere else:
    a spread is an eighth of the range at least, and every choice has some weight.
    """
    weights = np.array([weight for _, weight in values])
    weights = weights / weights.sum()
    if isinstance(distribution, CategoricalDistribution):
        shares = dict.fromkeys(distribution.choices, _LEAST_WEIGHT / len(distribution.choices))
        for (choice, _), weight in zip(values, weights, strict=True):
            shares[choice] += (1 - _LEAST_WEIGHT) * float(weight)
        return ChoicePrior(shares)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    numbers = np.array([float(value) for value, _ in values])
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        numbers, low, high = np.log(numbers), math.log(low), math.log(high)
    center = float(weights @ numbers)
    deviation = math.sqrt(float(weights @ (numbers - center) ** 2))
    spread = max(deviation, (high - low) * _LEAST_SPREAD)
    if distribution.log:
        center, spread = math.exp(center), math.exp(spread)
    return NumberPrior(center, spread)


def to_json(prior: Prior) -> dict[str, Any]:
    """The prior as JSON has it, where a choice may be a number: `from_json` reads it."""
    if isinstance(prior, NumberPrior):
        return {"center": prior.center, "spread": prior.spread}
    return {"weights": [[choice, weight] for choice, weight in prior.weights.items()]}


def from_json(value: Mapping[str, Any]) -> Prior:
    """The prior that `to_json` has written."""
    if "weights" in value:
        return ChoicePrior({choice: float(weight) for choice, weight in value["weights"]})
    return NumberPrior(float(value["center"]), float(value["spread"]))


def share(trials_before: int) -> float:
    """The probability that a trial is drawn from the prior, given how many were suggested before.

    A third for the first 8, then 8 / 3 divided by the trials so far: a tenth after 27 trials.
    """
    return _FIRST_SHARE * min(1.0, _FIRST_TRIALS / max(1, trials_before))


class PriorSampler(BaseSampler):
    """Draws a shrinking share of the trials from priors, and asks another sampler for the rest.

    Which trials these are, and their values, follow from the seed and the trial's number. So they
    are the same after a resume, and do not depend on which earlier trials have ended.
    """

    def __init__(self, sampler: BaseSampler, priors: Mapping[str, Prior], seed: int) -> None:
        self._sampler, self._priors, self._seed = sampler, dict(priors), seed
        self._drawn: dict[int, bool] = {}  # by trial number

    def draws_from_prior(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether this trial is drawn from priors. Enqueued trials do not count as suggested."""
        if trial.number not in self._drawn:
            before = suggested_before(study, trial)
            self._drawn[trial.number] = self._rng(trial, "").random() < share(before)
        return self._drawn[trial.number]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.draws_from_prior(study, trial):
            return {}  # every parameter is sampled independently
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        if not search_space and self.draws_from_prior(study, trial):
            return {}
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        prior = self._priors.get(param_name)
        if prior is not None and self.draws_from_prior(study, trial):
            return prior.sample(param_distribution, self._rng(trial, param_name))
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Any,
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._sampler.reseed_rng()

    def _rng(self, trial: FrozenTrial, name: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(name.encode())])


def suggested_before(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many earlier trials were suggested, and not enqueued."""
    earlier = study.get_trials(deepcopy=False)[: trial.number]
    return sum(origin_of(other.user_attrs) == "suggested" for other in earlier)


def with_priors(sampler: BaseSampler, space: SearchSpace, seed: int) -> BaseSampler:
    """The sampler, wrapped in a PriorSampler if the space has priors."""
    priors = {p.name: p.prior for p in space.parameters if p.prior is not None}
    return PriorSampler(sampler, priors, seed) if priors else sampler


def parse_prior(spec: Any, distribution: BaseDistribution) -> tuple[Prior | None, list[str]]:
    """The prior that a space file specifies for a parameter, and what is wrong with it."""
    if isinstance(distribution, CategoricalDistribution):
        return _parse_choices(spec, distribution)
    form = "must be {center: NUMBER, spread: NUMBER}"
    if not isinstance(spec, dict) or set(spec) != {"center", "spread"}:
        return None, [f"{form}, got {spec!r}."]
    numbers, mistakes = convert_fields(_Numbers, spec)
    if mistakes:
        return None, mistakes
    center, spread = numbers["center"], numbers["spread"]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.log and center <= 0:
        mistakes.append(f"center: must be above 0 on a logarithmic scale, got {center:g}.")
    if distribution.log and spread <= 1:
        mistakes.append(f"spread: must be a factor above 1 on a logarithmic scale, got {spread:g}.")
    if not distribution.log and spread <= 0:
        mistakes.append(f"spread: must be above 0, got {spread:g}.")
    return (None if mistakes else NumberPrior(center, spread)), mistakes


@dataclass(frozen=True)
class _Numbers:
    center: float
    spread: float


def _parse_choices(
    spec: Any, distribution: CategoricalDistribution
) -> tuple[Prior | None, list[str]]:
    choices = ", ".join(map(str, distribution.choices))
    form = f"must give a weight to choices of the parameter ({choices}), such as {{VALUE: 2}}"
    if not isinstance(spec, dict) or not spec:
        return None, [f"{form}, got {spec!r}."]
    weights: dict[Any, float] = {}
    mistakes = []
    for choice, weight in spec.items():
        if choice not in distribution.choices:
            mistakes.append(f"{choice!r} is never suggested ({choices}).")
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
            mistakes.append(f"{choice}: must be a weight of 0 or more, got {weight!r}.")
        else:
            weights[choice] = float(weight)
    if not mistakes and not any(weights.values()):
        mistakes.append("at least one weight must be above 0.")
    return (None if mistakes else ChoicePrior(weights)), mistakes
