"""The samplers by their names on the command line: our own, and Optuna's."""

from __future__ import annotations

import warnings

import optuna
from optuna.samplers import BaseSampler

from tune_app.study.gaussian_process import GaussianProcess
from tune_app.study.prior import with_priors
from tune_app.study.space import SearchSpace

_RANDOM_FIRST = 8  # trials; Optuna's own 10 is for longer searches than these


def build_sampler(name: str, space: SearchSpace, seed: int, done: int = 0) -> BaseSampler:
    """The sampler of that name for a space, which begins where the space's priors say. With one
    trial at a time, the same seed suggests the same.

    done: trials that had ended when the search was resumed. Optuna's samplers start anew then, and
        must not repeat their first suggestions.
    """
    if name == "gp":
        return GaussianProcess(space, seed)
    return with_priors(_optunas(name, seed + done), space, seed)


def _optunas(name: str, seed: int) -> BaseSampler:
    """Optuna's tpe, random or cmaes.

    tpe and cmaes start with random trials; TPE counts running trials among these, cmaes only
    finished ones. cmaes only models numbers that every trial has and samples the rest at random.
    Optuna would warn for each such parameter, so the warning is off.
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
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
