"""The trial as Ray Tune sees it: a featherweight that asks its host to train and passes on reports.

Its process imports neither torch nor Ray Tune, because starting a trial has to cost next to
nothing: an actor of Ray's takes 0.4 s of processor time, Ray Tune with pandas and Ray Data 0.5 s.
"""

from __future__ import annotations

import os
import platform
import time
from datetime import datetime
from typing import Any

import ray

from tune_app.run.trial_report import Report, Update
from tune_app.search.trial_job import DUPLICATE, JOB, REPORT, TrialJob, job_of
from tune_app.serve.connection import Connection

# An update comes within seconds; a host that has to load its model again takes longer.
_ANSWER_TIMEOUT_S = 300.0
_RETRY_S = 1.0
_TINY_CPU = 0.001  # a trial only waits; the host does the work


class TrialFailed(RuntimeError):
    """Training raised on the host; the text is its traceback."""


class MachinesFailed(TrialFailed):
    """The host or the swarm is gone, which says nothing about the trial's config."""


class TrialActor:
    """One trial after another: an actor of Tune's, which reuses it.

    No subclass of Tune's Trainable, or its process would have to import that; it has the methods
    that Tune calls (a test holds them against Trainable's).

    hosts: handles of the TrialHost actors; the one with the fewest trials gets the next one
    connection: the swarm, for a host that was restarted and has none
    """

    hosts: tuple[Any, ...] = ()
    connection = Connection()

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        from ray.tune import PlacementGroupFactory  # asked for where Tune runs

        return PlacementGroupFactory([{"CPU": _TINY_CPU}])

    def __init__(self, config: dict[str, Any], storage: Any = None) -> None:
        """config: holds the TrialJob (`job_of`); storage: Tune's, not used, for checkpoints and
        reports are in the run directory."""
        self._begin(config)
        self._first = self._job.name

    def __repr__(self) -> str:
        """The actor's name in Ray's dashboard; it is asked once, whatever the actor does later."""
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
        """The next report, with what Tune's Trainable adds to each; `done` with the last one.

        Raises TrialFailed or MachinesFailed; Tune then starts the trial again, and the host goes on
        from its last checkpoint, a bounded number of times.
        """
        try:
            if self._host is None:
                self._host = _least_loaded(self.hosts, self._job.number)
                self._ask("start", self._job, self.connection)
            while True:
                update: Update = self._ask("next_update", self._job.number)
                if update.error is not None:
                    raise (MachinesFailed if update.unavailable else TrialFailed)(update.error)
                if update.report is not None:
                    return self._result(update.report)
                if update.done:  # stopped by the host, with nothing new to report
                    return {DUPLICATE: True, "done": True}
        except ray.exceptions.RayActorError as error:
            raise MachinesFailed("the trial host died") from error
        except ray.exceptions.GetTimeoutError as error:
            raise MachinesFailed(f"no answer of the host in {_ANSWER_TIMEOUT_S:g} s") from error

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
        """Lets the host forget the trial, wherever its training stands."""
        if self._host is not None:
            self._host.stop.remote(self._job.number, self._job)
            self._host = None

    def get_current_ip_pid(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    def get_auto_filled_metrics(self, debug_metrics_only: bool = True) -> dict[str, Any]:
        """Where and when; asked for alone by Tune where a trial has ended without a report."""
        now = datetime.now()
        return {
            "date": now.strftime("%Y-%m-%d_%H-%M-%S"),
            "timestamp": int(now.timestamp()),
            "hostname": platform.node(),
            **dict(zip(("node_ip", "pid"), self.get_current_ip_pid(), strict=True)),
        }


def register_trial(hosts: list[Any], connection: Connection) -> str:
    """Tells Tune of `TrialActor` on these hosts; the name that `tune.Tuner` takes for it."""
    from tune_app.search.ray_tune.internals import register_actor  # where Tune runs

    values = {"hosts": tuple(hosts), "connection": connection}
    register_actor("Trial", type("Trial", (TrialActor,), values))
    return "Trial"


def _least_loaded(hosts: tuple[Any, ...], trial: int) -> Any:
    """The host with the fewest trials, and of several one after the other, since trials that begin
    at the same time do not see each other. Waits while none is there because Ray restarts them."""
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
            raise MachinesFailed("no trial host is left")
        time.sleep(_RETRY_S)
