"""The study's side of a search: which job comes next, and what the study is told about each.

Independent of Ray; executors use it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.trial import TrialState

from tune_app.run.run_dir import RunDir, Status
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report, deciding_steps, outcome
from tune_app.search.trial_job import TrialJob
from tune_app.study.space import SearchSpace, origin_of


class Jobs(Protocol):
    """The source of an executor's jobs, which is also told how they go."""

    def ask(self) -> TrialJob | None:
        """The next job; None if there are no more."""

    def change(self, number: int, config: TrialConfig) -> None:
        """A trial has another config from now on."""

    def report(self, number: int, report: Report) -> None:
        """A trial has been evaluated and continues training."""

    def behind(self, number: int) -> bool:
        """Whether a trial should be stopped early, given its reports and those of the others."""

    def end(self, number: int, last: Report | None, *, failed: bool = False) -> None:
        """A trial has ended, with its last report if it has one."""


@dataclass(frozen=True)
class Stage:
    """One part of a search: the search proper, or a step of the confirmation.

    name: "search" or "confirm"
    count: the most jobs to train
    at_once: how many of them train concurrently
    scheduler: the trial scheduler, which stops some of them early
    stopping: once it returns True, running trials end at their next step and no new one starts
    """

    name: str
    count: int
    at_once: int
    scheduler: str
    stopping: Callable[[], bool]


class JobList:
    """A fixed list of jobs; their results change nothing."""

    def __init__(self, jobs: Iterable[TrialJob]) -> None:
        self._jobs = iter(jobs)

    def ask(self) -> TrialJob | None:
        return next(self._jobs, None)

    def change(self, number: int, config: TrialConfig) -> None:
        pass

    def report(self, number: int, report: Report) -> None:
        pass

    def behind(self, number: int) -> bool:
        return False

    def end(self, number: int, last: Report | None, *, failed: bool = False) -> None:
        pass


class StudyTrials:
    """Asks the study for jobs and tells it their reports and results.

    An early-stopped trial is told as PRUNED with its curve, so that no sampler takes its last loss
    for a final one. A trial that is interrupted by the end of the search is not told at all
    (`requeue_unfinished` puts it back). Told trials have their last report among their user
    attributes, so the study alone shows how they ended.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        base: TrialConfig,
        run: RunDir,
        stop: Callable[[], bool],
        scheduler: str | None = None,
    ) -> None:
        """base: values of fields that the space leaves out; stop: whether the search is ending;
        scheduler: the search's trial scheduler, if not every evaluation may decide something
        """
        self._study, self._space, self._base = study, space, base
        self._run, self._stop, self._scheduler = run, stop, scheduler
        self._trials: dict[int, optuna.Trial] = {}
        self._configs: dict[int, TrialConfig] = {}
        self._defaults: set[int] = set()

    def ask(self) -> TrialJob | None:
        """The next trial's job: one that is waiting in the study, or a new suggestion. None once
        the search is ending."""
        if self._stop():
            return None
        trial = self._study.ask()
        self._trials[trial.number] = trial
        constants = self._space(trial) or {}
        if "config" in trial.user_attrs:  # a first trial, or a resumed one: its config is fixed
            config = TrialConfig.from_dict(trial.user_attrs["config"], self._base)
        else:
            config = self._space.trial_config({**trial.params, **constants}, self._base)
            trial.set_user_attr("config", config.to_dict())
        self._configs[trial.number] = config
        if origin_of(trial.user_attrs) == "default":
            self._defaults.add(trial.number)
        return TrialJob(
            number=trial.number,
            config=config,
            checkpoint=self._run.checkpoint(trial.number),
            origin=origin_of(trial.user_attrs),
            deciding=(
                None if self._scheduler is None else deciding_steps(self._scheduler, config.steps)
            ),
        )

    def change(self, number: int, config: TrialConfig) -> None:
        """The trial's config is no longer the suggested one (population-based training); the study
        keeps the new one as "trained"."""
        self._configs[number] = config

    def report(self, number: int, report: Report) -> None:
        """A trial has been evaluated and continues training."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed trial repeats its last report
            self._trials[number].report(report.objective, report.step)

    def behind(self, number: int) -> bool:
        """The answer of the study's pruner. The documented default always runs to its end, because
        the best config is compared with it."""
        return number not in self._defaults and self._trials[number].should_prune()

    def end(self, number: int, last: Report | None, *, failed: bool = False) -> None:
        """A trial has ended, with its last report if it has one."""
        trial, config = self._trials[number], self._configs[number]
        status, _ = outcome(last, config.steps)
        if not failed and status == Status.STOPPED and self._stop():
            return
        if config.changes:
            trial.set_user_attr("trained", config.to_dict())
        if last is not None:
            trial.set_user_attr("report", last.flat())
            self.report(number, last)
        if failed:
            self._study.tell(trial, state=TrialState.FAIL)
        elif last is None or status == Status.STOPPED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, last.objective)
        del self._trials[number], self._configs[number]  # a search may have very many
