"""One searched hyperparameter: its distribution, its prior, and when it exists.

Imports neither torch nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

if TYPE_CHECKING:
    from tune_app.study.prior import Prior


@dataclass(frozen=True)
class Parameter:
    """One searched field of TrialConfig, and the conditions on other parameters."""

    name: str
    space: str  # Ray's name, "loguniform" for instance; "python" in a Python space
    distribution: BaseDistribution
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prior: Prior | None = None
    where_possible: tuple[str, ...] = ()  # choices of init that not every search can use

    def active(self, values: Mapping[str, Any]) -> bool:
        """Whether the parameter exists, given these values of its parents.

        A parent that is itself inactive has no value, so its children are inactive too.
        """
        return all(
            parent in values and values[parent] in allowed for parent, allowed in self.when.items()
        )

    def without(self, choices: Collection[Any]) -> Parameter:
        """The parameter without these choices."""
        from tune_app.study.prior import ChoicePrior

        assert isinstance(self.distribution, CategoricalDistribution)
        kept = [choice for choice in self.distribution.choices if choice not in choices]
        prior = self.prior
        if isinstance(prior, ChoicePrior):
            weights = {c: weight for c, weight in prior.weights.items() if c in kept}
            prior = ChoicePrior(weights) if any(weights.values()) else None
        return replace(self, distribution=CategoricalDistribution(kept), prior=prior)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Any:
        """Asks the Optuna trial for a value."""
        d = self.distribution
        if isinstance(d, FloatDistribution):
            return trial.suggest_float(self.name, d.low, d.high, step=d.step, log=d.log)
        if isinstance(d, IntDistribution):
            return trial.suggest_int(self.name, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, CategoricalDistribution)
        return trial.suggest_categorical(self.name, d.choices)

    def range(self) -> str:
        """The values in words; bounds are inclusive here, unlike in the file."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return ", ".join("none" if choice is None else str(choice) for choice in d.choices)
        assert isinstance(d, FloatDistribution | IntDistribution)
        step = f", step {d.step:g}" if d.step is not None and d.step != 1 else ""
        return f"{d.low:g} to {d.high:g}{step}"

    def condition(self) -> str:
        """The condition in words, "" if there is none."""
        return " and ".join(
            f"{parent} is {' or '.join(map(str, allowed))}" for parent, allowed in self.when.items()
        )

    def __str__(self) -> str:
        condition = self.condition()
        return f"{self.space} {self.range()}" + (f" when {condition}" if condition else "")


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether Optuna could have suggested the value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if not isinstance(value, int | float) or not distribution.low <= value <= distribution.high:
        return False
    if isinstance(distribution, IntDistribution) and not float(value).is_integer():
        return False
    if distribution.step is None:
        return True
    count = (value - distribution.low) / distribution.step
    return abs(count - round(count)) < 1e-8


def share_of(distribution: BaseDistribution, value: float) -> float:
    """Where in the range a number is: 0 at the lower bound or below, 1 at the upper one or above.
    On a logarithmic scale the logarithm counts."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if low == high:
        return 0.0
    value = min(max(float(value), low), high)
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def at_share(distribution: BaseDistribution, share: float) -> float | int:
    """The number at that share of the range, rounded to the distribution's steps and kept within
    its bounds."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    return on_steps(distribution, value)


def on_steps(distribution: FloatDistribution | IntDistribution, value: float) -> float | int:
    """The nearest number that Optuna could suggest."""
    low, high = float(distribution.low), float(distribution.high)
    value = min(max(value, low), high)
    if distribution.step is not None:
        value = min(low + round((value - low) / distribution.step) * distribution.step, high)
    return round(value) if isinstance(distribution, IntDistribution) else value


class DrawnTrial(optuna.trial.FixedTrial):
    """A trial whose values `draw` chooses, for a space to be called with."""

    def __init__(self, draw: Callable[[str, BaseDistribution], Any]) -> None:
        super().__init__({})
        self._draw, self.drawn = draw, dict[str, Any]()

    @property
    def params(self) -> dict[str, Any]:
        return self.drawn

    def suggest_float(
        self,
        name: str,
        low: float,
        high: float,
        *,
        step: float | None = None,
        log: bool = False,
    ) -> float:
        return self._value(name, FloatDistribution(low, high, log=log, step=step))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return self._value(name, IntDistribution(low, high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._value(name, CategoricalDistribution(choices))

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self.drawn:
            self.drawn[name] = self._draw(name, distribution)
        return self.drawn[name]
