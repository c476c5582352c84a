"""Trials run by Ray Tune: each is an actor, and the hosts of a cluster train it."""

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
from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.callback import RecordsTrials
from tune_app.search.ray_tune.cluster import Cluster, open_cluster
from tune_app.search.ray_tune.internals import (
    ray_as_found,
    retried_if_actor_dies_between_trials,
    without_saved_trials,
    without_torch,
)
from tune_app.search.ray_tune.population import as_population
from tune_app.search.ray_tune.prometheus import export_event, hosts_watched
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.ray_tune.searcher import StudySearcher
from tune_app.search.ray_tune.trainable import register_trial
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Jobs, Stage
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
        cluster: Cluster,
    ) -> None:
        self._config, self._space, self._run = config, space, run
        self._cluster = cluster
        self.data, self.dashboard = cluster.data, cluster.dashboard
        self.tokens_in_flight = cluster.tokens_in_flight

    def train(self, jobs: Jobs, recorder: Recorder, stage: Stage) -> None:
        prepared, scheduler = None, build_trial_scheduler(stage.scheduler, self._config.steps)
        if stage.scheduler == "pbt":
            prepared, scheduler = as_population(
                self._config, self._space, self._run, jobs, stage.count, recorder.log
            )
        wait_if_died = self._cluster.wait_if_ray_died
        searcher = StudySearcher(jobs, wait_if_died, prepared)
        self._tuner(stage, searcher, scheduler, RecordsTrials(recorder, wait_if_died)).fit()

    def _tuner(
        self,
        stage: Stage,
        searcher: Searcher,
        scheduler: TrialScheduler,
        callback: tune.Callback,
    ) -> tune.Tuner:
        """What comes of its trials is in the events, which the recorder writes."""
        return tune.Tuner(
            register_trial(self._cluster.hosts, self._cluster.connection),
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode="min",
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=stage.count,
                max_concurrent_trials=stage.at_once,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=stage.name,
                storage_path=str(self._run.ray),
                stop=_EndSearch(stage.stopping, self._cluster.stop_trials),
                callbacks=[callback, _TensorBoard()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # hosts save them
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                verbose=1 if self._config.verbose else 0,
            ),
        )

    def counters(self) -> list[HostCounters]:
        return self._cluster.counters()

    def listen(self, event: Event) -> None:
        export_event(event)

    def watched(self, show: Callable[[list[HostCounters]], None]) -> AbstractContextManager[None]:
        return hosts_watched(self._cluster, show)


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
    """Ready to train. Raises ConfigError if the user's model, data or swarm cannot be used."""
    with (
        open_cluster(config, progress=progress, say=say, ray_died=ray_died) as cluster,
        ray_as_found(),
        retried_if_actor_dies_between_trials(),
        without_saved_trials(),
    ):
        yield RayTune(config, space, run, cluster)


class _EndSearch(tune.Stopper):
    """Stops all trials as soon as the search should end.

    Tune waits for each trial's next report first, so the hosts are told to end them immediately.
    """

    def __init__(self, stopping: Callable[[], bool], stop_trials: Callable[[], None]) -> None:
        self._stopping, self._stop_trials, self._stopped = stopping, stop_trials, False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # trials end on their own, or by the trial scheduler

    def stop_all(self) -> bool:
        if self._stopping() and not self._stopped:
            self._stopped = True
            self._stop_trials()
        return self._stopped


def _trial_name(trial: Any) -> str:
    return job_of(trial.config).name


class _TensorBoard(TBXLoggerCallback):
    """Ray's own, with each hyperparameter by name: for Ray the job is the only one."""

    def __init__(self) -> None:
        with without_torch():
            super().__init__()

    def log_trial_start(self, trial: Trial) -> None:
        trial.evaluated_params = job_of(trial.config).hyperparameters()
        super().log_trial_start(trial)
