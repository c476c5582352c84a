"""Where the trials of a search train: in Ray's processes, or in this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from tune_app.run.events import Event
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.threads import let_threads_sleep
from tune_app.search.recorder import Recorder
from tune_app.search.study_trials import Jobs
from tune_app.study.space import SearchSpace


class Executor(Protocol):
    """Trains jobs, several at the same time, each to its end or until it is stopped.

    about: what the host says of the data (`TrialHost.about`)
    tokens_in_flight: padded tokens that all hosts together compute at the same time
    dashboard: URL, or ""
    """

    about: dict[str, Any]
    tokens_in_flight: int
    dashboard: str

    def train(
        self,
        jobs: Jobs,
        recorder: Recorder,
        *,
        name: str,
        count: int,
        at_once: int,
        scheduler: str,
        stopping: Callable[[], bool],
    ) -> None:
        """Trains up to `count` of the jobs, `at_once` of them at the same time.

        What happens is told to `jobs` first, and then to the recorder. Once `stopping()` holds,
        trials end at their next step and no other begins.
        name: of this part of the search; scheduler: which trials are stopped early
        """

    def counters(self) -> list[dict[str, Any]]:
        """What each host has done so far."""

    def listen(self, event: Event) -> None:
        """Hears of every event of the search."""

    def watched(self, show: Callable[[list[dict[str, Any]]], None]) -> AbstractContextManager[None]:
        """Shows `counters` every few seconds, until the block ends."""


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

    Raises ConfigError where the user's model, data or swarm is not usable.
    progress: what is being waited for; say: what a person should know
    ray_died: called from a thread where the Ray that was started here loses one of its own
        processes. It has to leave: whatever asks Ray for anything waits for minutes, or for ever.
    """
    let_threads_sleep()
    # Imported here: they need a second, which a user's mistake should not have to wait for.
    opened: AbstractContextManager[Executor]
    if config.executor == "in-process":
        from tune_app.search.in_process import in_process

        opened = in_process(config, progress=progress)
    else:
        from tune_app.search.ray_tune.executor import ray_tune

        opened = ray_tune(config, space, run, progress=progress, say=say, ray_died=ray_died)
    with opened as executor:
        yield executor
