"""Trials in MLflow and in Weights & Biases as well, through Ray's own callbacks for them.

Ray's callbacks would log what this project hands through Ray: a job with paths in it, and Ray's
counters of its own calls. What a person looks for there are a trial's hyperparameters and its
reports by training step, so that is what they get.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune.experiment import Trial
from ray.tune.logger import LoggerCallback

from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.search.trial_job import REPORT, TrialJob, job_of


class _Tracked(LoggerCallback):
    """What both have in common; stands before Ray's own class among the bases.

    A tracking server that fails while the search runs must not end it: `say` tells it once, and
    the search goes on without.
    """

    name: str
    say: Callable[[str], None]
    lost = False
    begun: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes; listeners hold locks

    def setup(self, *arguments: Any, **named: Any) -> None:
        self._try(super().setup, *arguments, **named)

    def log_trial_start(self, trial: Trial) -> None:
        if trial.trial_id in self.begun:
            return  # one of a population has other parameters now, which MLflow refuses
        self.begun = self.begun | {trial.trial_id}
        given = trial.config
        trial.config = _parameters(job_of(given))
        try:
            self._try(super().log_trial_start, trial)
        finally:
            trial.config = given

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        report = result[REPORT].flat() | {
            "training_iteration": result["step"]
        }  # what both plot against
        self._try(super().log_trial_result, iteration, trial, report)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        self._try(super().log_trial_end, trial, failed)

    def _try(self, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        if self.lost:
            return
        try:
            call(*arguments, **named)
        except Exception as error:  # clients of servers: whatever they and their transport raise
            self.lost = True
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.say(f"{self.name} takes no more results, the search goes on without it: {reason}")


class _MLflow(_Tracked, MLflowLoggerCallback):
    name = "MLflow"


class _Wandb(_Tracked, WandbLoggerCallback):
    name = "Weights & Biases"


def tracking_callbacks(
    config: SearchConfig, run: RunDir, say: Callable[[str], None]
) -> list[LoggerCallback]:
    """Callbacks for --mlflow and --wandb: one MLflow run or W&B run for each trial.

    They are found under the name of the run's folder: MLflow's experiment, W&B's group.
    """
    callbacks: list[_Tracked] = []
    if config.mlflow is not None:
        callbacks.append(_MLflow(config.mlflow, experiment_name=run.path.name))
    if config.wandb is not None:
        # Its processes may be those of an existing Ray cluster, which do not have our environment.
        mode = {"mode": os.environ["WANDB_MODE"]} if "WANDB_MODE" in os.environ else {}
        # In the trials' folders, W&B's default, files would be copied before the last are written.
        callbacks.append(_Wandb(config.wandb, group=run.path.name, dir=str(run.path), **mode))
    for callback in callbacks:
        callback.say = say
    return callbacks


def _parameters(job: TrialJob) -> dict[str, Any]:
    """A trial's hyperparameters as far as they are set, and whose they are."""
    about = {"trial": job.number, "origin": job.origin, "of": job.of}
    told = about | job.config.to_dict()
    return {name: value for name, value in told.items() if value is not None}
