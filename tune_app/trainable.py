"""The trial as Ray Tune sees it: a featherweight that asks its host to train and passes on reports.

Imports no torch: starting a trial has to cost next to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray import tune

from tune_app.reports import Update
from tune_app.run_dir import RunDir
from tune_app.trial_config import TrialConfig
from tune_app.trial_job import Connection, TrialJob, number_of

# An update comes within a second; a host that has to load its model again takes longer.
_ANSWER_TIMEOUT_S = 300.0
_STATE = "state.pt"


class TrialFailed(RuntimeError):
    """Training raised on the host, or the host is gone; the text says which."""


def run_trial(config: dict[str, Any], hosts: list[Any], connection: Connection) -> None:
    """Ray Tune function trainable.

    config: under `job`, what `tuning.py` puts there: the run's folder, TrialConfig's fields, ...
    hosts: handles of the TrialHost actors; the one with the fewest trials gets this one
    connection: the swarm, for a host that was restarted and has none
    Raises TrialFailed; Ray retries it from the last checkpoint, a bounded number of times.
    """
    cloned = tune.get_checkpoint()  # population-based training: go on from another trial's state
    number, given = number_of(tune.get_context().get_trial_name()), config["job"]
    job = TrialJob(
        number=number,
        config=TrialConfig.from_dict(given["trial"]),
        checkpoint=RunDir(given["run"]).checkpoint(number),
        start_from=None if cloned is None else (Path(cloned.path) / _STATE).read_bytes(),
        test=given["test"],
        hand_over=given["hand_over"],
    )
    loads = ray.get([host.load.remote() for host in hosts], timeout=_ANSWER_TIMEOUT_S)
    host = hosts[loads.index(min(loads))]
    ray.get(host.start.remote(job, connection), timeout=_ANSWER_TIMEOUT_S)
    try:
        while not (update := _next_update(host, job.number)).done:
            if update.report is not None:
                checkpoint = None
                if job.hand_over:
                    checkpoint = tune.Checkpoint.from_directory(str(job.checkpoint))
                tune.report(update.report, checkpoint=checkpoint)
    finally:
        host.stop.remote(job.number)  # also where Tune stops the trial, with SystemExit in report


def _next_update(host: Any, number: int) -> Update:
    update: Update = ray.get(host.next_update.remote(number), timeout=_ANSWER_TIMEOUT_S)
    if update.error is not None:
        raise TrialFailed(update.error)
    return update
