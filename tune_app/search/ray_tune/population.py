"""Population-based training as a trial scheduler of Ray Tune."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune_app.run.event_log import EventLog
from tune_app.run.events import Clone, PopulationChanged
from tune_app.run.run_dir import RunDir
from tune_app.run.run_state import RunState
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.internals import train_on
from tune_app.search.study_trials import Jobs
from tune_app.search.trial_job import JOB, TrialJob, job_of
from tune_app.study.explore import explore
from tune_app.study.space import SearchSpace

_QUANTILE = 0.25  # that is replaced in each round, by clones of as many; Ray's default


class Population(FIFOScheduler):
    """Synchronous population-based training (Jaderberg et al. 2017, arXiv:1711.09846): after each
    evaluation but the last, all trials wait for each other, and the worst quarter is replaced by
    clones of the best quarter, with changed configs.

    Ranks and quantiles are those of Ray's PopulationBasedTraining. It is not a subclass of that:

    - a waiting trial keeps its actor (with no call outstanding) and its thread in the host. Ray's
      version restarts every actor in every round, and deadlocks if the last trial to report fails;
    - which trial is cloned, and the changes, follow from the seed and the losses. Ray's version
      draws from the global generators;
    - the hosts save the states of trials (`population_state`), so nothing passes through Ray;
    - the documented default is never replaced, because the best config is compared with it.

    A round is one event, written before any trial continues. If the search is killed, a round has
    been recorded completely or not at all.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: TrialConfig,
        *,
        size: int,
        seed: int,
        decided: int,
        changed: Callable[[PopulationChanged], None],
    ) -> None:
        """decided: the step of the last round; changed: called with each later one"""
        super().__init__()
        self._space, self._base, self._size, self._seed = space, base, size, seed
        self._decided, self._changed = decided, changed
        self._reports: dict[Trial, tuple[int, float]] = {}  # the last one: step, objective

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        self._reports.pop(trial, None)  # a trial that is retried is waited for again

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        step = result["step"]
        self._reports[trial] = step, result[OBJECTIVE]
        # A resumed trial repeats its last report. NOOP: it stays alive without a next request.
        return TrialScheduler.NOOP if step > self._decided else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Called in every turn of Tune's loop, so no trial waits for one that has just ended."""
        trials = controller.get_trials()
        alive = [trial for trial in trials if not trial.is_finished()]
        steps = [self._reports.get(trial, (0, math.nan))[0] for trial in alive]
        if len(trials) == self._size and steps and min(steps) > self._decided:
            self._decide(controller, alive, min(steps))
        return next((trial for trial in alive if trial.status == Trial.PAUSED), None)

    def _decide(self, controller: Any, alive: list[Trial], step: int) -> None:
        rng = random.Random(f"{self._seed} {step}")
        ranked = sorted(alive, key=lambda trial: -self._reports[trial][1])  # the worst first
        count = min(math.ceil(_QUANTILE * len(alive)), len(alive) // 2)
        worst, best = ranked[:count], ranked[len(ranked) - count :]
        clones = []
        for trial in worst:
            job = job_of(trial.config)
            if job.is_default:
                continue
            donor = rng.choice(best)
            of = job_of(donor.config)
            config = explore(of.config, step, self._space, self._base, rng)
            clones.append(Clone(job.number, of.number, config))
            self._reports[trial] = self._reports[donor]
            controller.pause_trial(trial, should_checkpoint=False)  # restarts with its new job
            trial.set_config({JOB: job.cloned(of.checkpoint, step, config)})
        self._decided = step
        self._changed(PopulationChanged(step=step, changed=tuple(clones)))
        for trial in alive:
            if trial.status == Trial.RUNNING:
                train_on(controller, trial)


def as_population(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    trials: Jobs,
    size: int,
    log: EventLog,
) -> tuple[Callable[[TrialJob], TrialJob], Population]:
    """What the searcher does to a job and the scheduler with which `size` trials of the study train
    as a population. It continues from where the run's events left it."""
    rounds = RunState.read(run).rounds

    def prepared(job: TrialJob) -> TrialJob:
        for event in rounds:
            for clone in event.changed:
                if clone.trial == job.number:
                    job = job.cloned(run.checkpoint(clone.of), event.step, clone.config)
        return replace(job, population=True)

    def changed(event: PopulationChanged) -> None:
        log.record(event)
        for clone in event.changed:
            trials.change(clone.trial, clone.config)

    population = Population(
        space,
        config.base_trial(),
        size=size,
        seed=config.seed,
        decided=max((event.step for event in rounds), default=0),
        changed=changed,
    )
    return prepared, population
