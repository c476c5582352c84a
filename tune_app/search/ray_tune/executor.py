"""Trials by Ray Tune: each an actor, trained by the hosts of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tune_app.run.events import Event
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.callback import RecordsTrials
from tune_app.search.ray_tune.cluster import Cluster, cluster
from tune_app.search.ray_tune.internals import ray_as_found, without_torch
from tune_app.search.ray_tune.population import as_population
from tune_app.search.ray_tune.prometheus import export_event, hosts_watched
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.ray_tune.searcher import StudySearcher
from tune_app.search.ray_tune.trainable import register_trial
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Jobs
from tune_app.search.trial_job import job_of
from tune_app.study.space import SearchSpace

_RETRIES = 2  # of a trial whose host or swarm failed


class RayTune:
    """An Executor: see `search/executor.py`."""

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        run: RunDir,
        machines: Cluster,
    ) -> None:
        self._config, self._space, self._run = config, space, run
        self._machines = machines
        self.about, self.dashboard = machines.about, machines.dashboard
        self.tokens_in_flight = machines.tokens_in_flight

    def train(
        self,
        jobs: Jobs,
        recorder: Recorder,
        *,
        name: str,
        count: int,
        at_once: int,
        scheduler: str,
        stopping: Callable[[], bool],
    ) -> None:
        prepared, rule = None, build_trial_scheduler(scheduler, self._config.steps)
        if scheduler == "pbt":
            prepared, rule = as_population(
                self._config, self._space, self._run, jobs, count, recorder.log
            )
        wait_if_died = self._machines.wait_if_ray_died
        _fit(
            self._config,
            self._run,
            self._machines,
            name=name,
            trials=count,
            at_once=at_once,
            searcher=StudySearcher(jobs, wait_if_died, prepared),
            scheduler=rule,
            callbacks=[RecordsTrials(recorder, wait_if_died)],
            stopping=stopping,
        )

    def counters(self) -> list[dict[str, Any]]:
        return self._machines.counters()

    def listen(self, event: Event) -> None:
        export_event(event)

    def watched(self, show: Callable[[list[dict[str, Any]]], None]) -> AbstractContextManager[None]:
        return hosts_watched(self._machines, show)


@contextmanager
def ray_tune(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    *,
    progress: Callable[[str], None],
    say: Callable[[str], None],
    ray_died: Callable[[], None],
) -> Iterator[RayTune]:
    """Ready to train. Raises ConfigError where the user's model, data or swarm is not usable."""
    with (
        cluster(config, progress=progress, say=say, ray_died=ray_died) as machines,
        ray_as_found(),
    ):
        yield RayTune(config, space, run, machines)


class _EndSearch(tune.Stopper):
    """Stops all trials as soon as the search is to end.

    Tune lets every trial come to its next report first, so the hosts are told not to wait for it.
    """

    def __init__(self, stopping: Callable[[], bool], stop_trials: Callable[[], None]) -> None:
        self._stopping, self._stop_trials, self._stopped = stopping, stop_trials, False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # trials end by themselves, or by the trial scheduler

    def stop_all(self) -> bool:
        if self._stopping() and not self._stopped:
            self._stopped = True
            self._stop_trials()
        return self._stopped


def _trial_name(trial: Any) -> str:
    return job_of(trial.config).name


class _TensorBoard(TBXLoggerCallback):
    """Ray's own, with a trial's hyperparameters by their names: Ray knows of one, the job."""

    def __init__(self) -> None:
        with without_torch():
            super().__init__()

    def log_trial_start(self, trial: Trial) -> None:
        trial.evaluated_params = job_of(trial.config).hyperparameters()
        super().log_trial_start(trial)


def _fit(
    config: SearchConfig,
    run: RunDir,
    machines: Cluster,
    *,
    name: str,
    trials: int,
    at_once: int,
    searcher: Searcher,
    scheduler: TrialScheduler,
    callbacks: list[tune.Callback],
    stopping: Callable[[], bool],
) -> None:
    """One `Tuner.fit()`; what comes of it is in the events, written by the recorder."""
    tuner = tune.Tuner(
        register_trial(machines.hosts, machines.connection),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=trials,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(run.ray),
            stop=_EndSearch(stopping, machines.stop_trials),
            callbacks=[*callbacks, _TensorBoard()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # hosts write them
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            verbose=1 if config.verbose else 0,
        ),
    )
    tuner.fit()
