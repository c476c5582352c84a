"""The trial host: one process that has the frozen model and the data, and trains many trials.

It does not depend on Ray; `ray_tune/cluster.py` makes it an actor. Each trial is a thread that runs
`train/loop.py`; the packer puts the rows of all trials into shared packs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tune_app.backbones.opening import open_backbone
from tune_app.models.import_less import import_less
from tune_app.run import test_rows
from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir, population_state, rows_file
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import Report, Update
from tune_app.search.trial_job import TrialJob
from tune_app.serve.connection import Connection
from tune_app.tasks.objectives import OBJECTIVES
from tune_app.tasks.summary import DataFacts

if TYPE_CHECKING:  # they import torch
    from tune_app.backbones.packer import Packer
    from tune_app.backbones.packing import Answer, Request

# A trial that has not asked for this long is gone, and its training is stopped.
_ABANDONED_S = 60.0
# Long-poll timeout: with nothing to report, the host sends an empty update, and the trial asks
# again.
_POLL_S = 10.0


class _Stop(Exception):
    """Raised in a trial's thread when its training should stop."""


@dataclass
class _RunningTrial:
    job: TrialJob
    packer: Packer
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    answered: bool = False  # a report has been fetched
    go_on: threading.Event = field(default_factory=threading.Event)  # the next one is requested
    asked_at: float = field(default_factory=time.monotonic)


class TrialHost:
    """Backbone, data and packer of one process. Raises if data or tokenizer cannot be used."""

    def __init__(
        self,
        name: str,
        config: SearchConfig,
        model: str,
        threads: int,
        *,
        is_restarted: bool = False,
    ) -> None:
        """threads: how many of the machine's CPUs this host may use
        is_restarted: this process is restarted when it ends, so it ends if a process of its swarm
            client has ended
        """
        warnings.simplefilter("ignore")
        if is_restarted:  # so it is the host's own
            import_less()
        # Imported here, because the driver refers to this class but does not need torch.
        import torch
        import torch._dynamo  # takes a second, which would otherwise slow the first optimizer step
        from transformers import AutoTokenizer

        from tune_app.tasks.loading import load_task_data

        torch.set_num_threads(1)  # the packer's workers have the others
        self._threads, self._is_restarted = threads, is_restarted
        self.name, self._config, self._model = name, config, model
        self._data = load_task_data(config, AutoTokenizer.from_pretrained(model))
        self._trials: dict[int, _RunningTrial] = {}
        self._packer: Packer | None = None
        self._connecting = threading.Lock()
        if config.backbone == "swarm":
            import tune_app.backbones.swarm  # noqa: F401 (seconds, while the swarm starts)

    def connect(self, connection: Connection) -> int:
        """Opens the backbone, unless it is open already. Returns how many padded tokens it computes
        concurrently.

        Raises BackboneUnavailable.
        """
        limits = self._connected(connection).backbone.limits
        return limits.packs_in_flight * limits.tokens_per_pack

    def _connected(self, connection: Connection) -> Packer:
        from tune_app.backbones.packer import Packer

        with self._connecting:
            if self._packer is None:
                share = self._threads / (os.cpu_count() or 1)
                backbone = open_backbone(
                    self._config,
                    self._model,
                    connection,
                    share,
                    end_with_client=self._is_restarted,
                )
                self._packer = Packer(backbone, self._threads)
                # Otherwise garbage collection scans all of torch, 0.16 s in which no trial runs.
                gc.freeze()
            return self._packer

    def data_facts(self) -> DataFacts:
        return DataFacts(self._data.summary, self._data.fingerprint, tuple(self._data.notes))

    def load(self) -> int:
        """The number of trials in training."""
        return len(self._trials)

    async def start(self, job: TrialJob, connection: Connection) -> None:
        """Starts training, from the job's checkpoint if there is one."""
        await self.stop(job.number)
        loop = asyncio.get_running_loop()
        packer = await loop.run_in_executor(None, self._connected, connection)
        trial = _RunningTrial(job, packer)
        self._trials[job.number] = trial
        threading.Thread(
            target=self._train, args=(trial, loop), name=f"trial-{job.number}", daemon=True
        ).start()

    async def next_update(self, number: int) -> Update:
        """The trial's next update; an empty one if there is nothing new."""
        trial = self._trials.get(number)
        if trial is None:
            return Update(error=f"{self.name} does not know trial {number}", unavailable=True)
        trial.asked_at = time.monotonic()
        if trial.answered:
            trial.answered = False
            trial.go_on.set()
        try:
            update = await asyncio.wait_for(trial.updates.get(), _POLL_S)
        except TimeoutError:
            return Update()
        trial.answered = update.report is not None
        return update

    async def stop(self, number: int, job: TrialJob | None = None) -> None:
        """Ends a trial's training at its next step. Does nothing if it has already ended, or if
        `job` is given and the trial has been restarted with another one."""
        if number in self._trials and job in (None, self._trials[number].job):
            self._end(self._trials.pop(number))

    @staticmethod
    def _end(trial: _RunningTrial) -> None:
        trial.stop.set()
        trial.go_on.set()

    async def stop_all(self) -> None:
        """Ends all trials; the answer to the next request for an update says so."""
        for trial in self._trials.values():
            self._end(trial)
            trial.updates.put_nowait(Update(done=True))

    def counters(self) -> HostCounters:
        """This host's counters so far, for the run's events."""
        if self._packer is None:
            return HostCounters(self.name)
        counters, traffic = self._packer.counters, self._packer.backbone.traffic
        active_s = max(counters.active_s(), 1e-9)
        backbone = self._packer.backbone
        health = backbone.health()
        return HostCounters(
            host=self.name,
            packs=counters.packs,
            requests=traffic.requests,
            retries=traffic.retries,
            rows=counters.rows,
            tokens=counters.tokens,
            occupancy=counters.rows / max(1, counters.row_slots),
            rows_per_s=counters.rows / active_s,
            tokens_per_s=counters.tokens / active_s,
            wait_s=counters.active_s(),
            servers=None if health is None else health.servers,
            blocks_served=None if health is None else health.blocks_served,
            blocks=None if health is None else backbone.num_blocks,
        )

    def close(self) -> None:
        for number in list(self._trials):
            self._end(self._trials.pop(number))
        if self._packer is not None:
            self._packer.close()
            self._packer.backbone.close()

    # ------------------------------------------------------------------------ in a trial's thread

    def _train(self, trial: _RunningTrial, loop: asyncio.AbstractEventLoop) -> None:
        from tune_app.backbones.protocol import BackboneUnavailable

        def send(update: Update) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nothing waits for the update
                loop.call_soon_threadsafe(trial.updates.put_nowait, update)

        try:
            with trial.packer.member():
                self._run(trial, send)
            send(Update(done=True))
        except _Stop:
            pass
        except BackboneUnavailable as error:
            send(Update(error=str(error), unavailable=True))
        except Exception:
            send(Update(error=traceback.format_exc()))

    def _run(self, trial: _RunningTrial, send: Callable[[Update], None]) -> None:
        from tune_app.train.checkpoint import is_of
        from tune_app.train.loop import TrainingRun, test_metrics
        from tune_app.train.prompt_model import PromptTunedModel

        job, data = trial.job, self._data

        def run_request(request: Request) -> Answer:
            if trial.stop.is_set() or time.monotonic() - trial.asked_at > _ABANDONED_S:
                raise _Stop
            return trial.packer.run(request)

        model = PromptTunedModel(
            trial.packer.backbone, run_request, data.task, data.outputs, job.config, data.start
        )
        objective = OBJECTIVES[self._config.objective]
        run = TrainingRun(model, data, job.config, objective)
        file = job.checkpoint / "state.pt"
        own = file.read_bytes() if file.is_file() else None
        if job.begin is not None and (own is None or not is_of(own, job.config)):
            run.take_over(job.begin.read_bytes(), spent=own)
        elif own is not None:
            run.load_state(own)

        def report(report: Report) -> None:
            if trial.stop.is_set():  # another host may continue it, and own its checkpoint
                raise _Stop
            last = report.step == job.config.steps and not report.diverged
            waits = job.population and not (last or report.diverged)
            if waits:
                save_population_state(job.checkpoint, report.step, run.state())
            RunDir(file.parent).write_atomic(file, run.state())
            if job.test and last:
                rows: list[dict[str, float]] = []
                metrics = {**report.metrics, **test_metrics(model, data, rows)}
                report = replace(report, metrics=metrics)
                RunDir(file.parent).write_atomic(rows_file(job.checkpoint), test_rows.packed(rows))
            trial.go_on.clear()
            send(Update(report=report))
            if waits:
                trial.go_on.wait()

        run.train(report, evaluate_on_the_way=job.of is None, deciding=job.deciding)


def save_population_state(checkpoint: Path, step: int, state: bytes) -> None:
    """Saves the state for other trials of the population, and keeps the previous one, which a
    cloned trial may not have read yet. Older ones are no longer needed."""
    RunDir(checkpoint).write_atomic(population_state(checkpoint, step), state)
    for old in sorted(checkpoint.glob("step-*.pt"))[:-2]:
        old.unlink()
