"""Where the trials of a search train: in Ray's processes, or in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from tune_app.run.events import Event
from tune_app.run.host_counters import HostCounters
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.threads import let_threads_sleep
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Jobs, Stage
from tune_app.serve.supervisor import PrivateSwarmError
from tune_app.study.space import SearchSpace
from tune_app.tasks.summary import DataFacts


class StartError(RuntimeError):
    """What a search runs on did not start: Ray, a trial host or the private swarm. The settings are
    not to blame."""


class Executor(Protocol):
    """Trains jobs, several of them concurrently, each to its end or until it is stopped.

    tokens_in_flight: padded tokens that all hosts together compute concurrently
    dashboard: URL, or ""
    """

    data: DataFacts
    tokens_in_flight: int
    dashboard: str

    def train(self, jobs: Jobs, recorder: Recorder, stage: Stage) -> None:
        """Trains the stage's jobs. Reports everything to `jobs` first, then to the recorder."""

    def counters(self) -> list[HostCounters]:
        """The counters of each host."""

    def listen(self, event: Event) -> None:
        """Called with every event of the search."""

    def watched(self, show: Callable[[list[HostCounters]], None]) -> AbstractContextManager[None]:
        """Calls `show` with the counters every few seconds until the block ends."""


@contextmanager
def open_executor(
    config: SearchConfig,
    space: SearchSpace,
    run: RunDir,
    *,
    progress: Callable[[str], None],
    say: Callable[[str], None],
    ray_died: Callable[[], None],
) -> Iterator[Executor]:
    """The executor of --executor, ready to train.

    progress: called with what is being waited for; say: called with other messages
    ray_died: called from a thread if the Ray that was started here loses one of its processes. It
        must end the process or the search, because calls to Ray would then block for minutes or
        forever.
    Raises ConfigError if the user's model, data or swarm cannot be used, StartError if something
    else is in the way.
    """
    let_threads_sleep()
    # Imported here, because it takes a second; a user's mistake is reported without it.
    opened: AbstractContextManager[Executor]
    if config.executor == "in-process":
        from tune_app.search.in_process import in_process

        opened = in_process(config, progress=progress)
    else:
        from tune_app.search.ray_tune.executor import ray_tune

        opened = ray_tune(config, space, run, progress=progress, say=say, ray_died=ray_died)
    try:
        with opened as executor:
            yield executor
    except PrivateSwarmError as error:
        raise StartError(str(error)) from error
