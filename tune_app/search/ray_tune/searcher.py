"""Where Ray Tune gets its trials from: jobs of the study, or a list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ray.tune.search import Searcher

from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.trial_job import JOB, REPORT, TrialJob, report_of
from tune_app.search.study_trials import StudyTrials


class StudySearcher(Searcher):
    """Tune's view of `StudyTrials`, in place of Ray's OptunaSearch: that one suggests parameters,
    this one whole jobs."""

    def __init__(
        self, trials: StudyTrials, prepared: Callable[[TrialJob], TrialJob] | None = None
    ) -> None:
        """prepared: changes a job before it is handed out, where the study does not know it all"""
        super().__init__(metric=OBJECTIVE, mode="min")
        self._trials, self._prepared = trials, prepared
        self._numbers: dict[str, int] = {}  # of trials, by Ray's id

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        job = self._trials.ask()
        if job is None:
            return str(Searcher.FINISHED)
        if self._prepared is not None:
            job = self._prepared(job)
            self._trials.change(job.number, job.config)
        self._numbers[trial_id] = job.number
        return {JOB: job}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._trials.report(self._numbers[trial_id], result[REPORT])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._trials.end(self._numbers[trial_id], report_of(result), failed=error)

    def save(self, checkpoint_path: str) -> None:
        """Tune saves searchers for its own `Tuner.restore`; here the study is what is saved."""


class JobList(Searcher):
    """Jobs that are known beforehand, one after the other; nobody learns from their results."""

    def __init__(self, jobs: Iterable[TrialJob]) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self._jobs = iter(jobs)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        job = next(self._jobs, None)
        return str(Searcher.FINISHED) if job is None else {JOB: job}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to restore: see StudySearcher."""
