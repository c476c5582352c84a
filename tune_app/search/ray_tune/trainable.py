"""The trial as Ray Tune sees it: a light actor that asks its host to train and passes on reports.

Its process imports neither torch nor Ray Tune, so that trials start cheaply: a Ray actor takes 0.4
s of CPU time, and importing Ray Tune with pandas and Ray Data another 0.5 s.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from datetime import datetime
from typing import Any

import ray

from tune_app.run.trial_report import Report, Update
from tune_app.search.trial_job import DUPLICATE, JOB, REPORT, TrialJob, job_of
from tune_app.serve.connection import Connection

# An update comes within seconds, unless a host has to load its model again.
_ANSWER_TIMEOUT_S = 300.0
_RETRY_S = 1.0
_TINY_CPU = 0.001  # a trial only waits; the host does the work


class TrialFailed(RuntimeError):
    """Training raised on the host; the text is its traceback."""


class InfrastructureFailed(TrialFailed):
    """The host or the swarm is gone; the trial's config is not to blame."""


@functools.cache
def _resources() -> Any:
    """For any trial. Tune keeps it with each, where a new one would be 1.5 KB."""
    from ray.tune import PlacementGroupFactory  # called in the process where Tune runs

    return PlacementGroupFactory([{"CPU": _TINY_CPU}])


class TrialActor:
    """An actor of Ray Tune that runs one trial after another.

    Not a subclass of Tune's Trainable, because its process would have to import that; it has the
    methods that Tune calls (a test compares them with Trainable's).

    hosts: handles of the TrialHost actors; the one with the fewest trials gets the next one
    connection: the swarm, for a host that was restarted and has none
    """

    hosts: tuple[Any, ...] = ()
    connection = Connection()

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        return _resources()

    def __init__(self, config: dict[str, Any], storage: Any = None) -> None:
        """config: has the TrialJob (`job_of`); storage: Tune's, not used, because checkpoints and
        reports are in the run directory"""
        self._begin(config)
        self._first = self._job.name

    def __repr__(self) -> str:
        """The actor's name in Ray's dashboard; Ray reads it once, when the actor starts."""
        return f"{self._first} and later"

    def reset(self, new_config: dict[str, Any], storage: Any = None) -> bool:
        """Makes this the actor of another trial."""
        self.stop()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._job: TrialJob = job_of(config)
        self._host: Any = None
        self._reports, self._began, self._reported = 0, time.time(), time.time()

    def train(self) -> dict[str, Any]:
        """The next report, with the fields that Tune's Trainable adds; `done` in the last one.

        Raises TrialFailed or InfrastructureFailed; Tune then restarts the trial a limited number of
        times, and the host resumes from the last checkpoint.
        """
        try:
            if self._host is None:
                self._host = _least_loaded(self.hosts, self._job.number)
                self._ask("start", self._job, self.connection)
            while True:
                update: Update = self._ask("next_update", self._job.number)
                if update.error is not None:
                    raise (InfrastructureFailed if update.unavailable else TrialFailed)(
                        update.error
                    )
                if update.report is not None:
                    return self._result(update.report)
                if update.done:  # stopped by the host, with nothing new to report
                    return {DUPLICATE: True, "done": True}
        except ray.exceptions.RayActorError as error:
            raise InfrastructureFailed("the trial host died") from error
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureFailed(
                f"no answer of the host in {_ANSWER_TIMEOUT_S:g} s"
            ) from error

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._host, method).remote(*arguments), timeout=_ANSWER_TIMEOUT_S)

    def _result(self, report: Report) -> dict[str, Any]:
        before, self._reported = self._reported, time.time()
        self._reports += 1
        return (
            report.flat()
            | self.get_auto_filled_metrics()
            | {
                REPORT: report,
                "done": report.diverged or report.step >= self._job.config.steps,
                "training_iteration": self._reports,
                "timesteps_total": report.step,  # what Ray's loggers (TensorBoard's) plot against
                "time_this_iter_s": self._reported - before,
                "time_total_s": self._reported - self._began,
                "config": {JOB: self._job},
            }
        )

    def stop(self) -> None:
        """Makes the host drop the trial, at any point of its training."""
        if self._host is not None:
            self._host.stop.remote(self._job.number, self._job)
            self._host = None

    def get_current_ip_pid(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    def get_auto_filled_metrics(self, debug_metrics_only: bool = True) -> dict[str, Any]:
        """Place and time; Tune requests only these if a trial has ended without a report."""
        now = datetime.now()
        return {
            "date": now.strftime("%Y-%m-%d_%H-%M-%S"),
            "timestamp": int(now.timestamp()),
            "hostname": platform.node(),
            **dict(zip(("node_ip", "pid"), self.get_current_ip_pid(), strict=True)),
        }


def register_trial(hosts: list[Any], connection: Connection) -> str:
    """Registers `TrialActor` for these hosts. Returns the name to give to `tune.Tuner`."""
    from tune_app.search.ray_tune.internals import register_actor  # called where Tune runs

    values = {"hosts": tuple(hosts), "connection": connection}
    register_actor("Trial", type("Trial", (TrialActor,), values))
    return "Trial"


def _least_loaded(hosts: tuple[Any, ...], trial: int) -> Any:
    """The host with the fewest trials. Ties are broken by the trial's number, because trials that
    start at the same time do not see each other. Waits while Ray is restarting all hosts."""
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        loads, dead = [], 0
        for i, load in enumerate([host.load.remote() for host in hosts]):
            try:
                trials = ray.get(load, timeout=_ANSWER_TIMEOUT_S)
                loads.append((trials, (i - trial) % len(hosts), i))
            except ray.exceptions.ActorUnavailableError:
                continue
            except ray.exceptions.ActorDiedError:
                dead += 1
        if loads:
            return hosts[min(loads)[2]]
        if dead == len(hosts) or time.monotonic() > deadline:
            raise InfrastructureFailed("no trial host is left")
        time.sleep(_RETRY_S)
