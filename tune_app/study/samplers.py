"""Optuna's samplers by their names on the command line."""

from __future__ import annotations

import warnings

import optuna

_RANDOM_FIRST = 8  # trials; Optuna's own 10 is for longer searches than these


def build_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded: with one trial at a time, suggestions are the same.

    All start with random trials; TPE counts running trials among these, the others only finished
    ones. gp and cmaes only model parameters that every trial has (cmaes: numeric ones only) and
    sample the rest at random. Optuna would warn for each such parameter, so the warning is off.
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=_RANDOM_FIRST, warn_independent_sampling=False
        )
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
