"""Writes what happens to trials into the run's events."""

from __future__ import annotations

from collections.abc import Callable

from tune_app.run.event_log import EventLog
from tune_app.run.events import TrialEnded, TrialReported, TrialRetried, TrialStarted
from tune_app.run.passwords import without_passwords
from tune_app.run.run_dir import Status
from tune_app.run.trial_report import Report, outcome
from tune_app.search.trial_job import TrialJob


class Recorder:
    """Writes what an executor tells of its trials as events.

    stop: whether the search is ending; a trial interrupted by that gets no `trial_ended` event.
    """

    def __init__(self, log: EventLog, stop: Callable[[], bool]) -> None:
        self.log, self._stop = log, stop

    def started(self, job: TrialJob) -> None:
        self.log.record(
            TrialStarted(
                trial=job.number, origin=job.origin, config=job.config, of=job.of, look=job.look
            )
        )

    def reported(self, job: TrialJob, report: Report) -> None:
        self.log.record(TrialReported(trial=job.number, report=report))

    def retried(self, job: TrialJob, reason: str, *, machines: bool) -> None:
        """machines: it was an infrastructure failure, not a bad config"""
        self.log.record(
            TrialRetried(trial=job.number, reason=without_passwords(reason), machines=machines)
        )

    def ended(self, job: TrialJob, last: Report | None) -> None:
        status, reason = outcome(last, job.config.steps)
        if status != Status.STOPPED or not self._stop():
            self.log.record(TrialEnded(trial=job.number, status=status, reason=reason))

    def failed(self, job: TrialJob, reason: str) -> None:
        self.log.record(
            TrialEnded(trial=job.number, status=Status.FAILED, reason=without_passwords(reason))
        )
