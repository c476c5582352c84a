"""Optuna behind Ray Tune: which config a trial gets, and what the study is told of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_app.optuna_space import SearchSpace
from tune_app.trial_config import TrialConfig

STUDY_NAME = "tune_app"
METRIC = "objective"


def build_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded: with one trial at a time, the same suggestions.

    Random until 8 trials have finished (Optuna's own 10 is for longer searches than these).
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=8)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
        )


def requeue_unfinished(study: optuna.Study) -> list[int]:
    """Lets the study ask again for trials that a killed search left running; their numbers.

    Optuna keeps a trial's number and params while it is not finished, so the trial goes on as
    itself. There is no public call for the way back from RUNNING.
    """
    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in unfinished:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return [trial.number for trial in unfinished]


class StudySearcher(OptunaSearch):
    """Ray's OptunaSearch with whole trial configs, and with what a search that goes on needs.

    Differences: an early-stopped trial is told as PRUNED with its curve, not as complete; a trial
    that the end of the search interrupts is put back (`requeue_unfinished`), not told at all.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: TrialConfig,
        *,
        storage: optuna.storages.BaseStorage,
        sampler: optuna.samplers.BaseSampler,
        settings: dict[str, Any],
        stopping: Callable[[], bool],
    ) -> None:
        """settings: what else the trainable gets; stopping: whether the search ends."""
        super().__init__(
            space=space,
            metric=METRIC,
            mode="min",
            sampler=sampler,
            study_name=STUDY_NAME,
            storage=storage,
        )
        self._base, self._settings, self._stopping = base, settings, stopping

    @property
    def study(self) -> optuna.Study:
        return self._ot_study

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._stopping():
            return Searcher.FINISHED
        trial = self._ot_trials.setdefault(trial_id, None) or self._ot_study.ask()
        self._ot_trials[trial_id] = trial
        constants = self._space(trial) or {}
        config = self._space.trial_config({**trial.params, **constants}, self._base)
        if "config" not in trial.user_attrs:
            trial.set_user_attr("origin", "suggested")
            trial.set_user_attr("config", asdict(config))
            trial.set_user_attr("in_space", True)
        return {
            "job": {
                "number": trial.number,
                "origin": trial.user_attrs["origin"],
                "trial": asdict(config),
                **self._settings,
            }
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._ot_trials[trial_id].report(result[METRIC], result["step"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._ot_trials[trial_id]
        steps = trial.user_attrs["config"]["steps"]
        if error:
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif result and (result["diverged"] or result["step"] >= steps):
            self._ot_study.tell(trial, result[METRIC])
        elif self._stopping():
            self._ot_study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        else:
            self._ot_study.tell(trial, state=TrialState.PRUNED)
