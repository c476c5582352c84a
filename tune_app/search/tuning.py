"""The search itself: Optuna's trials, on any executor, and the confirmation of the best configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler

from tune_app.report.results import load
from tune_app.report.write import refreshed_in_background
from tune_app.run.event_log import EventLog
from tune_app.run.events import SearchEnded, SearchResumed, SearchStarted, WarmStarted
from tune_app.run.own_code import sign
from tune_app.run.run_dir import RunDir
from tune_app.run.run_state import RunState
from tune_app.run.search_config import SearchConfig
from tune_app.search.checks import check_same_data, judged_otherwise
from tune_app.search.concurrency import runs_at_once, trials_at_once
from tune_app.search.confirm_plan import ConfirmRun, next_step
from tune_app.search.executor import Executor
from tune_app.search.live import LiveView
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import JobList, Stage, StudyTrials
from tune_app.search.tracking import trackers
from tune_app.search.trial_job import TrialJob, confirmation_number
from tune_app.search.warm_start import take_over
from tune_app.study.prior import from_json
from tune_app.study.pruners import build_pruner
from tune_app.study.python_space import code_recorded
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.storage import missing_events, open_study, requeue_unfinished, study_name
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.search.stop_conditions import StopConditions


def whole_search(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    executor: Executor,
    view: LiveView,
    stop: StopConditions,
) -> None:
    """Search and confirmation; tables and page are kept up to date meanwhile."""
    check_same_data(config, run, executor.data.fingerprint)
    run.write_atomic(run.space_yaml, space.text)
    run.write_atomic(run.search_yaml, config.to_yaml())
    if (code := code_recorded(run.space_yaml)) is not None:
        sign(run, code)
    view.introduce(executor)
    if judged_otherwise(run):
        view.say(
            "note: the run's earlier trials were compared on the first validation rows; new ones "
            "are compared on a sample that is stratified by class"
        )
    with (
        refreshed_in_background(run),
        executor.watched(view.show_hosts),
        trackers(config, run, view.say) as tracked,
    ):
        log = EventLog(run, stop.listen, view.listen, executor.listen, *tracked)
        search(config, space, run, executor, log, stop)
        confirm(config, run, executor, view, log, stop)


def search(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    executor: Executor,
    log: EventLog,
    stop: StopConditions,
) -> None:
    """Runs the remaining trials of the search; all finished ones are in the study and the events.

    Continues the study and the events of earlier calls in the same run directory.
    """
    before = RunState.read(run)
    study, base = open_study(config, run, study_name(config, run)), config.base_trial()
    warm = _record_start(config, space, study.study_name, executor, log, before)
    requeue_unfinished(study)
    for event in missing_events(study, before):
        log.record(event)
    stop.begin(RunState.read(run))
    earlier = () if warm is None else warm.first
    # They come first in the study too, so after a kill their number shows which ones are missing.
    for first in space.first_trials(base, config.trial, earlier)[
        len(study.get_trials(deepcopy=False)) :
    ]:
        first.enqueue(study)
    done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    left = config.trials - done
    if left > 0 and not stop():
        study.sampler = _sampler(config, space, warm, done)
        if config.executor == "in-process":
            study.pruner = build_pruner(config.scheduler, config.steps)
        trials = StudyTrials(study, space, base, run, stop, config.scheduler)
        at_once = trials_at_once(config, executor.tokens_in_flight)
        if config.scheduler == "pbt":
            at_once = left  # the whole population
        try:
            executor.train(
                trials, Recorder(log, stop), Stage("search", left, at_once, config.scheduler, stop)
            )
        finally:
            requeue_unfinished(study)
    _record_end(log, executor, stop)


def _record_start(
    config: SearchConfig,
    space: SearchSpace,
    study: str,
    executor: Executor,
    log: EventLog,
    before: RunState,
) -> WarmStarted | None:
    """Records the start, or that the search is resumed; returns what it took over from earlier
    runs."""
    warm = before.warm
    if config.warm_start and warm is None:  # before all others, so that no kill comes between
        warm = take_over(config, space)
        log.record(warm)
    begins = SearchStarted if before.first is None else SearchResumed
    log.record(
        begins(
            trials=config.trials,
            task=config.task,
            metric=task_named(config.task).metric,
            sampled=space.sampled_names,
            fingerprint=executor.data.fingerprint,
            classes=executor.data.summary.class_names,
            data=executor.data.summary.to_dict(),
            study=study,
        )
    )
    return warm


def _sampler(
    config: SearchConfig, space: SearchSpace, warm: WarmStarted | None, done: int
) -> BaseSampler:
    """`done`: trials that have ended."""
    # A population starts before there are results to learn from.
    name = "random" if config.scheduler == "pbt" else config.sampler
    taken = {} if warm is None else {k: from_json(v) for k, v in warm.priors.items()}
    expected = space.expecting(taken, own=config.prior == "on")
    return build_sampler(name, expected, config.seed, done)


def confirm(
    config: SearchConfig,
    run: RunDir,
    executor: Executor,
    view: LiveView,
    log: EventLog,
    stop: StopConditions,
) -> None:
    """Trains the best configs again with fresh seeds, chooses one, and compares it with the default
    on the test split, with more seeds while the result is undecided. In the events, these runs have
    the origin `confirm`.

    A spent budget only ends the search; its result is still confirmed, but without further looks.
    """
    begun: set[tuple[int, int]] = set()
    while config.confirm and not stop.urgent:
        step = next_step(load(run), config, extend=not stop())
        new = {(again.of, again.seed_index) for again in step.runs}
        if not new - begun:  # nothing is left, or only runs that were started and did not end
            break
        begun |= new
        further = any(again.look > 1 for again in step.runs)
        stopping: Callable[[], bool] = stop if further else _urgent(stop)
        view.say(step.purpose)
        view.expect(len(step.runs))
        executor.train(
            JobList([_confirm_job(again, run) for again in step.runs]),
            Recorder(log, stopping),
            Stage("confirm", len(step.runs), runs_at_once(config), "none", stopping),
        )
    if begun:
        _record_end(log, executor, stop)


def _urgent(stop: StopConditions) -> Callable[[], bool]:
    return lambda: stop.urgent


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


def _record_end(log: EventLog, executor: Executor, stop: StopConditions) -> None:
    reason = stop.reason or "all trials are done"
    log.record(SearchEnded(reason=reason, hosts=tuple(executor.counters())))
