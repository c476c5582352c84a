"""The search itself: Optuna's trials, wherever they train, and the proof of what they found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tune_app.report.results import load
from tune_app.report.write import kept_fresh
from tune_app.run.event_log import EventLog
from tune_app.run.events import RunState, SearchEnded, SearchResumed, SearchStarted
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.search.checks import check_same_data, judged_otherwise
from tune_app.search.concurrency import runs_at_once, trials_at_once
from tune_app.search.confirm_plan import ConfirmRun, next_step
from tune_app.search.executor import Executor
from tune_app.search.live import LiveView
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import JobList, StudyTrials
from tune_app.search.tracking import trackers
from tune_app.search.trial_job import TrialJob, confirmation_number
from tune_app.search.warm_start import take_over
from tune_app.study.prior import from_json, with_priors
from tune_app.study.pruners import build_pruner
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.storage import missing_events, open_study, requeue_unfinished, study_name
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.search.stop_conditions import Ending


def whole_search(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    executor: Executor,
    live: LiveView,
    ending: Ending,
) -> None:
    """Search and confirmation, with tables and page that follow them."""
    check_same_data(config, run, executor.about["fingerprint"])
    run.write_atomic(run.space_yaml, space.text)
    run.write_atomic(run.search_yaml, config.to_yaml())
    live.introduce(executor)
    if judged_otherwise(run):
        live.say(
            "note: the run's earlier trials were compared on the first validation rows, those to "
            "come on a sample in which each class has its share"
        )
    with (
        kept_fresh(run),
        executor.watched(live.show_hosts),
        trackers(config, run, live.say) as tracked,
    ):
        log = EventLog(run, ending.listen, live.listen, executor.listen, *tracked)
        search(config, space, run, executor, log, ending)
        confirm(config, run, executor, live, log, ending)


def search(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    executor: Executor,
    log: EventLog,
    ending: Ending,
) -> None:
    """Runs what is left of the search's trials; every finished one is in the study and the events.

    The study and the events of an earlier call in the same run directory are gone on with.
    """
    before = RunState.read(run)
    name = study_name(config, run)
    study, base = open_study(config, run, name), config.base_trial()
    begins = SearchStarted if before.first is None else SearchResumed
    warm = before.warm
    if config.warm_start and warm is None:  # before all others, so that no kill comes between
        warm = take_over(config, space)
        log.record(warm)
    earlier = () if warm is None else warm.first
    log.record(
        begins(
            trials=config.trials,
            task=config.task,
            metric=task_named(config.task).metric,
            sampled=space.sampled_names,
            fingerprint=executor.about["fingerprint"],
            classes=tuple(executor.about["classes"]),
            data=executor.about["data"],
            study=name,
        )
    )
    requeue_unfinished(study)
    for event in missing_events(study, before):
        log.record(event)
    ending.begin(RunState.read(run))
    # They come first in the study too, so that those that a kill kept out of it can be told.
    for first in space.first_trials(base, config.trial, earlier)[
        len(study.get_trials(deepcopy=False)) :
    ]:
        first.enqueue(study)
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    left = config.trials - len(done)
    if left > 0 and not ending():
        # Suggestions of a resumed search must not repeat those of its beginning.
        # A population begins before there is a result to learn from.
        sampler = build_sampler(
            "random" if config.scheduler == "pbt" else config.sampler, config.seed + len(done)
        )
        taken = {} if warm is None else {k: from_json(v) for k, v in warm.priors.items()}
        expected = space.expecting(taken, own=config.prior == "on")
        study.sampler = with_priors(sampler, expected, config.seed)
        if config.executor == "in-process":
            study.pruner = build_pruner(config.scheduler, config.steps)
        trials = StudyTrials(study, space, base, run, ending, config.scheduler)
        try:
            executor.train(
                trials,
                Recorder(log, ending),
                name="search",
                count=left,
                at_once=(
                    left
                    if config.scheduler == "pbt"
                    else trials_at_once(config, executor.tokens_in_flight)
                ),
                scheduler=config.scheduler,
                stopping=ending,
            )
        finally:
            requeue_unfinished(study)
    _record_end(log, executor, ending)


def confirm(
    config: SearchConfig,
    run: RunDir,
    executor: Executor,
    live: LiveView,
    log: EventLog,
    ending: Ending,
) -> None:
    """Trains the best configs again with fresh seeds, chooses one, and judges it and the default on
    the test split, with more seeds where a few do not decide; `confirm` runs in the events.

    A budget that is spent ends the search only: what was found is confirmed. But there is no
    further look then.
    """
    begun: set[tuple[int, int]] = set()
    while config.confirm and not ending.urgent:
        step = next_step(load(run), config, extend=not ending())
        new = {(again.of, again.seed_index) for again in step.runs}
        if not new - begun:  # nothing is left, or what is left does not come to an end
            break
        begun |= new
        further = any(again.look > 1 for again in step.runs)
        stopping: Callable[[], bool] = ending if further else _urgent(ending)
        live.say(step.purpose)
        live.expect(len(step.runs))
        executor.train(
            JobList([_confirm_job(again, run) for again in step.runs]),
            Recorder(log, stopping),
            name="confirm",
            count=len(step.runs),
            at_once=runs_at_once(config),
            scheduler="none",
            stopping=stopping,
        )
    if begun:
        _record_end(log, executor, ending)


def _urgent(ending: Ending) -> Callable[[], bool]:
    return lambda: ending.urgent


def _confirm_job(again: ConfirmRun, run: RunDir) -> TrialJob:
    number = confirmation_number(again.of, again.seed_index)
    return TrialJob(
        number=number,
        config=again.config,
        checkpoint=run.checkpoint(number),
        origin="confirm",
        of=again.of,
        look=again.look,
        test=again.look > 0,
    )


def _record_end(log: EventLog, executor: Executor, ending: Ending) -> None:
    reason = ending.reason or "all trials are done"
    log.record(SearchEnded(reason=reason, hosts=tuple(executor.counters())))
