"""Optuna's samplers by their names on the command line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_app.study.space import quiet_optuna

_RANDOM_FIRST = 8  # trials; Optuna's own 10 is for longer searches than these


class GaussianProcess(BaseSampler):
    """Optuna's GPSampler, which is shown what it can learn from.

    It standardises losses, so one trial that diverged would make all others look alike: losses far
    above the median are lowered (`capped`). It ignores trials that were stopped early: they count
    with the loss that they were heading for (`expected_end`). And a trial outside the space, which
    has no params, would keep it from learning anything: it is left out.

    It models parameters that all trials have, and learns from the first trial that ends. The rest
    is drawn at random.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._independent = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        space = optuna.search_space.intersection_search_space(_told(study), include_pruned=True)
        return {name: known for name, known in space.items() if not known.single()}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        told = _told(study)
        finished = [one for one in told if one.state == TrialState.COMPLETE]
        values = capped([expected_end(one, finished) for one in told])
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        running = [one for one in running if search_space.keys() <= one.params.keys()]

        def shown(one: FrozenTrial, **how: Any) -> FrozenTrial:
            params = {name: one.params[name] for name in search_space}
            return create_trial(params=params, distributions=search_space, **how)

        sampler = optuna.samplers.GPSampler(seed=self._seed + trial.number, n_startup_trials=1)
        with quiet_optuna():
            model = optuna.create_study(sampler=sampler)
            model.add_trials(
                shown(one, value=value) for one, value in zip(told, values, strict=True)
            )
            model.add_trials(shown(one, state=TrialState.RUNNING) for one in running)
            return model.ask(search_space).params

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self._independent.reseed_rng()


def _told(study: optuna.Study) -> list[FrozenTrial]:
    """The trials within the space that have ended with a loss."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if trial.params and trial.value is not None]


def expected_end(trial: FrozenTrial, finished: Sequence[FrozenTrial]) -> float:
    """The trial's loss; if it was stopped early, what that would have become if it had changed as
    the median of the finished trials did from that step on."""
    assert trial.value is not None
    if trial.state == TrialState.COMPLETE:
        return trial.value
    step = trial.last_step
    changes = [
        other.value - other.intermediate_values[step]
        for other in finished
        if other.value is not None and step in other.intermediate_values
    ]
    return trial.value + (float(np.median(changes)) if changes else 0.0)


def capped(losses: Sequence[float]) -> list[float]:
    """The losses, at most as far above their median as the lowest is below.

    >>> capped([1.0, 1.5, 1.25, 20.0, 1.75])
    [1.0, 1.5, 1.25, 2.0, 1.75]
    """
    most = 2 * float(np.median(losses)) - min(losses)
    return [min(loss, most) for loss in losses]


def build_sampler(name: str, seed: int) -> BaseSampler:
    """Optuna's sampler of that name, seeded: with one trial at a time, suggestions are the same.

    tpe and cmaes start with random trials; TPE counts running trials among these, cmaes only
    finished ones. gp and cmaes only model parameters that every trial has (cmaes: numeric ones
    only) and sample the rest at random. Optuna would warn for each such parameter, so the warning
    is off.
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return GaussianProcess(seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(
            seed=seed, n_startup_trials=_RANDOM_FIRST, warn_independent_sampling=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=_RANDOM_FIRST,
        )
