"""Where Ray Tune gets its trials from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.study_trials import Jobs
from tune_app.search.trial_job import JOB, REPORT, TrialJob, report_of


class StudySearcher(Searcher):
    """Tune's view of `Jobs`. Replaces Ray's OptunaSearch, which suggests parameters instead of
    whole jobs."""

    def __init__(
        self,
        trials: Jobs,
        wait_if_ray_died: Callable[[], None],
        prepared: Callable[[TrialJob], TrialJob] | None = None,
    ) -> None:
        """prepared: changes a job before it is handed out, where the study does not know it all"""
        super().__init__(metric=OBJECTIVE, mode="min")
        self._trials, self._prepared = trials, prepared
        self._wait_if_ray_died = wait_if_ray_died
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
        if error:
            self._wait_if_ray_died()
        self._trials.end(self._numbers.pop(trial_id), report_of(result), failed=error)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with the trials, and the study's URL may have a password
