"""Trials in this process, without Ray: the same host, packer and study, for debugging and tests.

If the process dies, all its trials stop; --resume continues the run, with either executor.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from tune_app.models.folder import model_folder
from tune_app.run.events import Event
from tune_app.run.host_counters import HostCounters
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.trial_report import Report, Update
from tune_app.search.host import TrialHost
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Jobs, Stage
from tune_app.search.trial_job import TrialJob
from tune_app.serve.connection import Connection, connection_to, start_private_swarm

_RETRIES = 2  # of a trial that failed, as under Ray
_LOOK_S = 0.1  # how often to check whether the search should end


class InProcess:
    """An Executor: see `search/executor.py`. Trials are threads of a single host."""

    def __init__(self, host: TrialHost, connection: Connection, tokens_in_flight: int) -> None:
        self._host, self._connection = host, connection
        self.data, self.dashboard, self.tokens_in_flight = host.data_facts(), "", tokens_in_flight

    def train(self, jobs: Jobs, recorder: Recorder, stage: Stage) -> None:
        failed: list[BaseException] = []

        def loop() -> None:
            try:
                asyncio.run(self._train_all(jobs, recorder, stage))
            except BaseException as error:
                failed.append(error)

        # In a separate thread, because a notebook already runs an event loop in this one.
        thread = threading.Thread(target=loop, name=stage.name, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_S)  # signals are handled in between
        if failed:
            raise failed[0]

    async def _train_all(self, jobs: Jobs, recorder: Recorder, stage: Stage) -> None:
        left = iter(range(stage.count))

        async def one_after_another() -> None:
            while not stage.stopping() and next(left, None) is not None:
                job = jobs.ask()
                if job is None:
                    return
                recorder.started(job)
                await self._train_one(job, jobs, recorder)

        async def end_when_told() -> None:
            while not stage.stopping():
                await asyncio.sleep(_LOOK_S)
            await self._host.stop_all()

        watching = asyncio.create_task(end_when_told())
        async with asyncio.TaskGroup() as group:
            for _ in range(min(stage.at_once, stage.count)):
                group.create_task(one_after_another())
        watching.cancel()

    async def _train_one(self, job: TrialJob, jobs: Jobs, recorder: Recorder) -> None:
        reports: list[Report] = []
        for attempt in range(_RETRIES + 1):
            failure = await self._train_once(job, jobs, recorder, reports)
            last = reports[-1] if reports else None
            if failure is None:
                jobs.end(job.number, last)
                recorder.ended(job, last)
                return
            reason = str(failure.error).strip().splitlines()[-1]
            if attempt < _RETRIES:
                recorder.retried(job, reason, machines=failure.unavailable)
        jobs.end(job.number, last, failed=True)
        recorder.failed(job, reason)

    async def _train_once(
        self, job: TrialJob, jobs: Jobs, recorder: Recorder, reports: list[Report]
    ) -> Update | None:
        """Trains to the end, or until the trial is stopped, and appends to `reports`. Returns the
        failure, if there was one."""
        await self._host.start(job, self._connection)
        try:
            while True:
                update = await self._host.next_update(job.number)
                if update.error is not None:
                    return update
                if update.report is not None:
                    reports.append(update.report)
                    jobs.report(job.number, update.report)
                    recorder.reported(job, update.report)
                    if update.report.diverged or update.report.step >= job.config.steps:
                        return None
                    if jobs.behind(job.number):
                        return None
                elif update.done:  # stopped by the host, with nothing new to report
                    return None
        finally:
            await self._host.stop(job.number)

    def counters(self) -> list[HostCounters]:
        return [self._host.counters()]

    def listen(self, event: Event) -> None:
        pass

    def watched(self, show: Callable[[list[HostCounters]], None]) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def in_process(config: SearchConfig, *, progress: Callable[[str], None]) -> Iterator[InProcess]:
    """Ready to train. Afterwards the process's warnings, threads and garbage collection are as
    before.

    Raises ConfigError if the user's model, data or swarm cannot be used.
    """
    from tune_app.backbones.protocol import BackboneUnavailable

    model = model_folder(config.model, config.revision)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())  # the host turns them off
        stack.enter_context(_torch_as_before())
        private = start_private_swarm(config, model, progress=progress)
        if private is not None:
            stack.callback(private.stop)
        progress("loading the model and the data")
        host = TrialHost("host-0", config, str(model), os.cpu_count() or 1)
        stack.callback(host.close)
        if private is not None:
            private.wait_until_ready(progress=progress)
        connection = connection_to(config, model, private)
        try:
            tokens = host.connect(connection)
        except BackboneUnavailable as error:
            raise ConfigError(f"--peers: {error}") from error
        yield InProcess(host, connection, tokens)


@contextmanager
def _torch_as_before() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        gc.unfreeze()
