"""Optuna behind Ray Tune: which config a trial gets, and what the study is told of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune_app.run.run_dir import Status
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import kept, outcome
from tune_app.search.ray_tune.trial_job import trial_name
from tune_app.study.space import SearchSpace, origin_of

METRIC = "objective"


def build_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name, seeded: with one trial at a time, the same suggestions.

    Random for the first 8 trials (Optuna's own 10 is for longer searches than these); TPE counts
    those that still run, the others only finished ones.
    gp and cmaes learn of the parameters that every trial has, cmaes of numbers only; they draw the
    others at random, of which Optuna would warn at each.
    """
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=8, warn_independent_sampling=False
        )
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(
            seed=seed, n_startup_trials=8, warn_independent_sampling=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
        )


class StudySearcher(OptunaSearch):
    """Ray's OptunaSearch with whole trial configs, and with what a search that goes on needs.

    Differences: an early-stopped trial is told as PRUNED with its curve, not as complete; a trial
    that the end of the search interrupts is not told at all (`requeue_unfinished` puts it back);
    a told trial has its last report beside it, so that the study alone knows what came of it.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: TrialConfig,
        *,
        study: optuna.Study,
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
            study_name=study.study_name,
            storage=study._storage,
        )
        self._base, self._settings, self._stopping = base, settings, stopping

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._stopping():
            return Searcher.FINISHED
        trial = self._ot_trials[trial_id] = self._ot_study.ask()
        constants = self._space(trial) or {}
        config = self._space.trial_config({**trial.params, **constants}, self._base)
        if "config" not in trial.user_attrs:
            trial.set_user_attr("config", config.to_dict())
        return {
            "job": {
                "number": trial.number,
                "origin": origin_of(trial.user_attrs),
                "trial": config.to_dict(),
                **self._settings,
            }
        }

    def ask(self, count: int) -> list[dict[str, Any]]:
        """The jobs of so many trials at once, which are known by their names from then on."""
        jobs = []
        for _ in range(count):
            suggested = self.suggest("next")
            if isinstance(suggested, dict):
                jobs.append(suggested["job"])
                name = trial_name(jobs[-1]["number"])
                self._ot_trials[name] = self._ot_trials.pop("next")
        return jobs

    def note(self, trial_id: str, key: str, value: Any) -> None:
        """Keeps something beside a trial in the study."""
        self._ot_trials[trial_id].set_user_attr(key, value)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._report(self._ot_trials[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial, last = self._ot_trials[trial_id], kept(result or {})
        status, _ = outcome(last, trial.user_attrs["config"]["steps"])
        if not error and status == Status.STOPPED and self._stopping():
            return
        if last:
            trial.set_user_attr("report", last)
            self._report(trial, last)  # Ray does not pass on the one that a trial ends at
        if error:
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif status == Status.STOPPED:
            self._ot_study.tell(trial, state=TrialState.PRUNED)
        else:
            self._ot_study.tell(trial, last[METRIC])

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that goes on repeats its last report
            trial.report(result[METRIC], result["step"])
