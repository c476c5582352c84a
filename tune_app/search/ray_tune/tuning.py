"""The search itself: Ray Tune with Optuna over the hosts, and the proof of what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher

from tune_app.report.results import load
from tune_app.run.events import EventLog, RunState, SearchEnded, SearchResumed, SearchStarted
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import OBJECTIVE, evaluation_steps
from tune_app.search.concurrency import runs_at_once, trials_at_once
from tune_app.search.live import LiveView
from tune_app.search.ray_tune.cluster import Cluster
from tune_app.search.ray_tune.population import as_population
from tune_app.search.ray_tune.prometheus import export_event
from tune_app.search.ray_tune.recorder import Recorder
from tune_app.search.ray_tune.searcher import JobList, StudySearcher
from tune_app.search.ray_tune.trainable import register_trial
from tune_app.search.ray_tune.trial_job import (
    TrialJob,
    confirmation_number,
    job_of,
)
from tune_app.search.study_trials import StudyTrials
from tune_app.study.prior import with_priors
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.storage import missing_events, open_study, requeue_unfinished, study_name
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.search.stop_conditions import Ending

_RETRIES = 2  # of a trial whose host or swarm failed


def build_trial_scheduler(name: str, steps: int) -> TrialScheduler:
    """Ray Tune's scheduler of that name, with rungs at steps at which trials are evaluated."""
    if name == "none":
        return FIFOScheduler()
    common: dict[str, Any] = {"time_attr": "step"}
    first = evaluation_steps(steps)[0]
    if name == "asha":
        # The worse half ends at three fifths of the run. Warmup and large learning rates make a
        # loss worse before it gets better: judged at the first evaluations, the best configs are
        # in the worse half (benchmarks/sample_efficiency.py).
        judged = evaluation_steps(steps)[len(evaluation_steps(steps)) * 3 // 5 - 1]
        return _never_stops_default(
            AsyncHyperBandScheduler(
                **common, max_t=steps + 1, grace_period=judged, reduction_factor=2
            )
        )
    if name == "median":
        return _never_stops_default(
            MedianStoppingRule(**common, grace_period=first, min_samples_required=3)
        )
    return HyperBandScheduler(**common, max_t=steps + 1, reduction_factor=3)


def _never_stops_default(scheduler: TrialScheduler) -> TrialScheduler:
    """The documented default runs to its end: the answer is stated against it."""
    decide = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = decide(controller, trial, result)
        return TrialScheduler.CONTINUE if job_of(trial.config).number == 0 else decision

    scheduler.on_trial_result = on_trial_result
    return scheduler


def _keeps_actors(scheduler: TrialScheduler) -> TrialScheduler:
    """Tune starts pending trials by itself, the latest in an actor that is free. A pending trial
    that its scheduler chooses is given that actor too, even while its own one starts, which is then
    thrown away: short trials would cost a process each."""
    choose = scheduler.choose_trial_to_run

    def choose_trial_to_run(controller: Any) -> Trial | None:
        trial = choose(controller)
        return trial if trial is not None and trial.status == Trial.PAUSED else None

    scheduler.choose_trial_to_run = choose_trial_to_run
    return scheduler


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


def search(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    machines: Cluster,
    live: LiveView,
    ending: Ending,
) -> None:
    """Runs what is left of the search's trials; every finished one is in the study and the events.

    The study and the events of an earlier call in the same run directory are gone on with.
    """
    before = RunState.read(run)
    name = study_name(config, run)
    study, base = open_study(config, run, name), config.base_trial()
    log = _log(run, live, ending)
    begins = SearchStarted if before.first is None else SearchResumed
    log.record(
        begins(
            trials=config.trials,
            task=config.task,
            metric=task_named(config.task).metric,
            sampled=space.sampled_names,
            fingerprint=machines.about["fingerprint"],
            classes=tuple(machines.about["classes"]),
            data=machines.about["data"],
            study=name,
        )
    )
    requeue_unfinished(study)
    for event in missing_events(study, before):
        log.record(event)
    ending.begin(RunState.read(run))
    # They come first in the study too, so that those that a kill kept out of it can be told.
    for first in space.first_trials(base, config.trial)[len(study.get_trials(deepcopy=False)) :]:
        first.enqueue(study)
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    left = config.trials - len(done)
    if left > 0 and not ending():
        # Suggestions of a resumed search must not repeat those of its beginning.
        # A population begins before there is a result to learn from.
        sampler = build_sampler(
            "random" if config.scheduler == "pbt" else config.sampler, config.seed + len(done)
        )
        if config.prior == "on":
            sampler = with_priors(sampler, space, config.seed)
        study.sampler = sampler
        trials = StudyTrials(study, space, base, run, ending)
        try:
            searcher: StudySearcher
            scheduler: TrialScheduler
            if config.scheduler == "pbt":
                searcher, scheduler = as_population(config, space, run, trials, left, log)
                at_once = left
            else:
                searcher = StudySearcher(trials)
                scheduler = build_trial_scheduler(config.scheduler, config.steps)
                at_once = trials_at_once(config, machines.tokens_in_flight)
            _fit(
                config,
                run,
                machines,
                name="search",
                trials=left,
                at_once=at_once,
                searcher=searcher,
                scheduler=scheduler,
                callbacks=[Recorder(log, ending)],
                stopping=ending,
                say=live.say,
            )
        finally:
            requeue_unfinished(study)
    _record_end(log, machines, ending)


def confirm(
    config: SearchConfig, run: RunDir, machines: Cluster, live: LiveView, ending: Ending
) -> None:
    """Trains the best configs and the documented default again, each with the same fresh seeds,
    and judges them on the test split; the results are `confirm` runs in the events."""
    results = load(run)
    if config.confirm == 0 or ending.urgent or results.default is None:
        return
    best = [int(trial) for trial in results.finished["trial"] if trial != 0][: config.confirm]
    if not best:
        return
    done = {
        (trial.of, trial.config.seed)
        for trial in RunState.read(run).trials.values()
        if trial.config is not None and trial.ended is not None and trial.of is not None
    }
    jobs = []
    for of in [0, *best]:
        for seed in range(1, config.confirm_seeds + 1):
            trial = {**results.configs[of], "seed": config.seed + 1000 * seed}
            if (of, trial["seed"]) not in done:
                number = confirmation_number(of, seed)
                jobs.append(
                    TrialJob(
                        number=number,
                        config=TrialConfig.from_dict(trial),
                        checkpoint=run.checkpoint(number),
                        origin="confirm",
                        of=of,
                        test=True,
                    )
                )
    if not jobs:
        return

    def stopping() -> bool:
        return ending.urgent  # a budget has ended the search at most

    live.say(
        f"confirming the best {len(best)} and the default with {config.confirm_seeds} fresh seeds"
    )
    live.expect(len(jobs))
    log = _log(run, live, ending)
    _fit(
        config,
        run,
        machines,
        name="confirm",
        trials=len(jobs),
        at_once=runs_at_once(config),
        searcher=JobList(jobs),
        scheduler=FIFOScheduler(),
        callbacks=[Recorder(log, stopping)],
        stopping=stopping,
        say=live.say,
    )
    _record_end(log, machines, ending)


def _record_end(log: EventLog, machines: Cluster, ending: Ending) -> None:
    reason = ending.reason or "all trials are done"
    log.record(SearchEnded(reason=reason, hosts=tuple(machines.counters())))


def _trial_name(trial: Any) -> str:
    return job_of(trial.config).name


def _log(run: RunDir, live: LiveView, ending: Ending) -> EventLog:
    return EventLog(run, ending.listen, live.listen, export_event)


def _tracking(config: SearchConfig, run: RunDir, say: Callable[[str], None]) -> list[Any]:
    if config.mlflow is None and config.wandb is None:
        return []
    from tune_app.search.ray_tune.tracking import (
        tracking_callbacks,  # imports what is installed of both
    )

    return tracking_callbacks(config, run, say)


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
    say: Callable[[str], None],
) -> None:
    """One `Tuner.fit()`; what comes of it is in the events, written by the recorder."""
    tuner = tune.Tuner(
        register_trial(machines.hosts, machines.connection),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=searcher,
            scheduler=_keeps_actors(scheduler),
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
            callbacks=[*callbacks, *_tracking(config, run, say)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # hosts write them
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            verbose=1 if config.verbose else 0,
        ),
    )
    tuner.fit()
