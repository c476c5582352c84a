"""The trial as Ray Tune sees it: a featherweight that asks its host to train and passes on reports.

Imports no torch: starting a trial has to cost next to nothing.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import tune
from ray.tune.trainable import wrap_function

from tune_app.reports import Update
from tune_app.run_dir import RunDir
from tune_app.trial_config import TrialConfig
from tune_app.trial_job import Connection, TrialJob, number_of

# An update comes within a second; a host that has to load its model again takes longer.
_ANSWER_TIMEOUT_S = 300.0
_RETRY_S = 1.0
_TINY_CPU = 0.001  # a trial only waits; the host does the work


def trial_class(hosts: list[Any], connection: Connection) -> type[tune.Trainable]:
    """`run_trial` for these hosts as Tune wants it, under a name to recognise in Ray's dashboard.

    An actor runs one trial after another and is named once, hence "trial-003 and later".
    """
    function = tune.with_parameters(run_trial, hosts=hosts, connection=connection)
    function = tune.with_resources(function, {"cpu": _TINY_CPU})

    class Trial(wrap_function(function)):  # type: ignore[misc]
        def __repr__(self) -> str:
            return f"{self.trial_name} and later"

    Trial.__qualname__ = "Trial"  # what the dashboard calls the class
    return Trial


class TrialFailed(RuntimeError):
    """Training raised on the host; the text is its traceback."""


class MachinesFailed(TrialFailed):
    """The host or the swarm is gone, which says nothing about the trial's config."""


def run_trial(config: dict[str, Any], hosts: list[Any], connection: Connection) -> None:
    """Ray Tune function trainable.

    config: under `job`, what `tuning.py` puts there: the run's folder, TrialConfig's fields, ...
    hosts: handles of the TrialHost actors; the one with the fewest trials gets this one
    connection: the swarm, for a host that was restarted and has none
    Raises TrialFailed or MachinesFailed; Ray starts it again, from its last checkpoint, a bounded
    number of times.
    """
    number, given = number_of(tune.get_context().get_trial_name()), config["job"]
    job = TrialJob(
        number=number,
        config=TrialConfig.from_dict(given["trial"]),
        checkpoint=RunDir(given["run"]).checkpoint(number),
        test=given["test"],
    )
    try:
        _follow(_least_loaded(hosts), job, connection)
    except ray.exceptions.RayActorError as error:
        raise MachinesFailed("the trial host died") from error
    except ray.exceptions.GetTimeoutError as error:
        raise MachinesFailed(f"no answer of the host in {_ANSWER_TIMEOUT_S:g} s") from error


def _least_loaded(hosts: list[Any]) -> Any:
    """The host with the fewest trials; waits while none is there because Ray restarts them."""
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        loads, dead = [], 0
        for i, load in enumerate([host.load.remote() for host in hosts]):
            try:
                loads.append((ray.get(load, timeout=_ANSWER_TIMEOUT_S), i))
            except ray.exceptions.ActorUnavailableError:
                continue
            except ray.exceptions.ActorDiedError:
                dead += 1
        if loads:
            return hosts[min(loads)[1]]
        if dead == len(hosts) or time.monotonic() > deadline:
            raise MachinesFailed("no trial host is left")
        time.sleep(_RETRY_S)


def _follow(host: Any, job: TrialJob, connection: Connection) -> None:
    """Has the host train, and passes its reports on until the training is done."""
    ray.get(host.start.remote(job, connection), timeout=_ANSWER_TIMEOUT_S)
    try:
        while not (update := _next_update(host, job.number)).done:
            if update.report is not None:
                # What Ray's loggers (TensorBoard's, say) plot against.
                tune.report(update.report | {"timesteps_total": update.report["step"]})
    finally:
        host.stop.remote(job.number)  # also where Tune stops the trial, with SystemExit in report


def _next_update(host: Any, number: int) -> Update:
    update: Update = ray.get(host.next_update.remote(number), timeout=_ANSWER_TIMEOUT_S)
    if update.error is not None:
        raise (MachinesFailed if update.unavailable else TrialFailed)(update.error)
    return update
