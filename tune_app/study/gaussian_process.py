"""The sampler `gp`: suggests where a Gaussian process expects the most of a trial (surrogate.py).

Optuna's GPSampler fits the kernel's parameters, models only what all trials have, ignores trials
that were stopped early, and learns nothing from the others if one lies outside the space. Here:

- Candidates are points that the space itself suggests, with its conditions, also those of a Python
  function. A parameter that a point does not have counts as being in the middle of its range, and
  as different from having it.
- Losses far above the others are lowered (`capped`), or one divergence would make all others look
  alike.
- A stopped trial counts with the loss it was heading for (`expected_ends`).
- A trial outside the space, such as the documented default, counts as the nearest point of it.

The first four suggestions are a Latin hypercube (McKay, Beckman and Conover 1979) of the priors:
each parameter takes a value from each quarter of its prior, or of its range if it has none. Further
ones before any trial has ended are such hypercubes of the whole space. So are the next four if none
of the priors' suggestions has beaten the documented default: then the priors are probably wrong,
and the model knows little beyond them.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tune_app.run.trial_config import TrialConfig
from tune_app.study.parameter import at_share, contains, share_of
from tune_app.study.prior import suggested_before, value_at
from tune_app.study.space import SearchSpace, origin_of
from tune_app.study.surrogate import expected_improvement

_FIRST = 4  # trials, of the Latin hypercube
# Candidates of a suggestion: anywhere in the space, and near the best trials.
_ANYWHERE = 192
_BEST, _NEAR_EACH = 4, 16
_KEPT = 0.5  # the probability that a neighbour has the same value of a parameter
_STEP = 0.1  # standard deviation of a change, as a share of the range
# Trials that a suggestion is learned from at most: the best ones and the newest.
_BEST_LEARNED = _NEWEST_LEARNED = 50

Point = Mapping[str, Any]  # the values of a trial's parameters


class GaussianProcess(BaseSampler):
    """All it knows is in the study. Its random numbers follow from the seed and the trial's number,
    so a resumed search goes on as it would have done."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space, self._seed = space, seed
        self._encoding = Encoding(space)
        self._priors = {p.name: p.prior for p in space.parameters}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        ended = [t for t in others if self._learned(t)]
        before = suggested_before(study, trial)
        if before < _FIRST or not ended or (before < 2 * _FIRST and self._misled(ended)):
            point = self._first(before)
        else:
            running = [t for t in others if t.state == TrialState.RUNNING]
            point = self._best_candidate(ended, running, self._rng(trial))
        # A Python space may suggest what was not seen when it was tried.
        return {name: value for name, value in point.items() if name in search_space}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return value_at(self._rng(trial, param_name).random(), param_distribution)

    def _learned(self, trial: FrozenTrial) -> bool:
        ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        return ended and trial.value is not None and bool(self._point(trial))

    def _point(self, trial: FrozenTrial) -> Point:
        """Where the trial is in the space; empty if that is not known."""
        if trial.params or "config" not in trial.user_attrs:
            return trial.params
        return self._space.nearest(TrialConfig.from_known(trial.user_attrs["config"]))

    def _misled(self, ended: Sequence[FrozenTrial]) -> bool:
        """Whether there are priors, and all they suggested is worse than the documented default."""

        def lowest(origin: str) -> float:
            losses = (_value(t) for t in ended if origin_of(t.user_attrs) == origin)
            return min(losses, default=math.inf)

        has_priors = any(prior is not None for prior in self._priors.values())
        return has_priors and lowest("default") <= lowest("suggested") < math.inf

    def _first(self, place: int) -> Point:
        """The point at that place of a Latin hypercube of the priors; after its end, of the whole
        space: if many trials begin before any has ended, not all of them rely on the prior."""
        block, place = divmod(place, _FIRST)
        priors = {} if block else self._priors

        def draw(name: str, distribution: BaseDistribution) -> Any:
            rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), block])
            share = (rng.permutation(_FIRST)[place] + rng.random(_FIRST)[place]) / _FIRST
            return value_at(share, distribution, priors.get(name))

        return self._space.drawn(draw)

    def _best_candidate(
        self,
        ended: Sequence[FrozenTrial],
        running: Sequence[FrozenTrial],
        rng: np.random.Generator,
    ) -> Point:
        losses = capped(expected_ends(ended))
        ranked = np.argsort(losses, kind="stable")
        newest = np.arange(len(ended))[-_NEWEST_LEARNED:]
        learned = np.union1d(ranked[:_BEST_LEARNED], newest)
        best = [self._point(ended[i]) for i in ranked[:_BEST]]
        known = self._encoding.encode([self._point(ended[i]) for i in learned])
        waiting = self._encoding.encode([p for t in running if (p := self._point(t))])
        candidates = self._candidates(best, rng)
        encoded = self._encoding.encode(candidates)
        tried = {row.tobytes() for row in (*known, *waiting)}
        new = [i for i, row in enumerate(encoded) if row.tobytes() not in tried]
        if new:  # a small space may have nothing new to offer
            candidates, encoded = [candidates[i] for i in new], encoded[new]
        expected = expected_improvement(
            known, losses[learned], waiting, encoded, self._encoding.parameter_of_column
        )
        return candidates[int(np.argmax(expected))]

    def _candidates(self, best: Sequence[Point], rng: np.random.Generator) -> list[Point]:
        def anywhere(name: str, distribution: BaseDistribution) -> Any:
            return value_at(rng.random(), distribution)

        def near(point: Point) -> Callable[[str, BaseDistribution], Any]:
            def draw(name: str, distribution: BaseDistribution) -> Any:
                value = point.get(name)
                if rng.random() < _KEPT and contains(distribution, value):
                    return value
                if isinstance(distribution, CategoricalDistribution) or value is None:
                    return anywhere(name, distribution)
                return at_share(distribution, share_of(distribution, value) + _STEP * rng.normal())

            return draw

        draws = [anywhere] * _ANYWHERE + [near(point) for point in best for _ in range(_NEAR_EACH)]
        return [self._space.drawn(draw) for draw in draws]

    def _rng(self, trial: FrozenTrial, name: str = "") -> np.random.Generator:
        return np.random.default_rng([self._seed, trial.number, zlib.crc32(name.encode())])


class Encoding:
    """Points of a space as rows of numbers; the distances between them are what a kernel sees.

    A number has a column for its share of the range, and another for not having it, if it has a
    condition. A choice has a column for each of its values and one for any other or none; any two
    of them are 1 apart, as far as the ends of a range.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._parameters = space.parameters
        columns = [
            len(d.choices) + 1 if isinstance(d := p.distribution, CategoricalDistribution) else 2
            for p in space.parameters
        ]
        self._starts = np.concatenate([[0], np.cumsum(columns)])
        self.parameter_of_column = np.repeat(np.arange(len(columns)), columns)

    def encode(self, points: Sequence[Point]) -> np.ndarray:
        """A row for each point."""
        rows = np.zeros((len(points), self._starts[-1]))
        for parameter, start in zip(self._parameters, self._starts, strict=False):
            name, distribution = parameter.name, parameter.distribution
            for row, point in zip(rows, points, strict=True):
                value = point.get(name)
                if isinstance(distribution, CategoricalDistribution):
                    choices = distribution.choices
                    has = name in point and value in choices
                    place = choices.index(value) if has else len(choices)
                    row[start + place] = np.sqrt(0.5)
                elif value is None:
                    row[start : start + 2] = 0.5, 1.0
                else:
                    row[start] = share_of(distribution, value)
        return rows


def expected_ends(trials: Sequence[FrozenTrial]) -> np.ndarray:
    """The trials' losses; for one that was stopped early, what its loss would have become if it had
    changed as the median of the finished trials did from that step on."""

    @functools.cache
    def change(step: int) -> float:
        changes = [
            _value(trial) - trial.intermediate_values[step]
            for trial in trials
            if trial.state == TrialState.COMPLETE and step in trial.intermediate_values
        ]
        return float(np.median(changes)) if changes else 0.0

    def end(trial: FrozenTrial) -> float:
        if trial.state == TrialState.COMPLETE or trial.last_step is None:
            return _value(trial)
        return _value(trial) + change(trial.last_step)

    return np.array([end(trial) for trial in trials])


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def capped(losses: np.ndarray) -> np.ndarray:
    """The losses, at most as far above their median as the lowest is below; finite.

    >>> capped(np.array([1.0, 1.5, 1.25, np.inf, 1.75])).tolist()
    [1.0, 1.5, 1.25, 2.0, 1.75]
    """
    known = losses[np.isfinite(losses)]
    if not len(known):
        return np.zeros_like(losses)
    most = 2 * float(np.median(np.where(np.isfinite(losses), losses, known.max()))) - known.min()
    return np.clip(losses, known.min(), most)
