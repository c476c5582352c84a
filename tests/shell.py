"""Lines of the pages as a reader types them: in bash, on this machine, with this Python."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pages import ROOT

_PATHS = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated .venv
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
}


def users_environment() -> dict[str, str]:
    """This process's, without the token that tests/conftest.py gives to the tests' own Ray."""
    return {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}


def _typed_in(folder: Path, more: Mapping[str, str] | None) -> dict[str, Any]:
    return {
        "cwd": folder,
        "env": users_environment() | _PATHS | (more or {}),
        "stdin": subprocess.DEVNULL,
    }


def shell(script: str, folder: Path, more: Mapping[str, str] | None = None) -> str:
    """What a script prints, which must succeed. `more`: environment on top of this process's."""
    done = subprocess.run(
        ["bash", "-ec", script],
        **_typed_in(folder, more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def background(
    script: str,
    folder: Path,
    until: str,
    more: Mapping[str, str] | None = None,
    timeout_s: float = 100,
) -> Iterator[re.Match[str]]:
    """A script that runs on; yields what `until` finds in its output.

    Ended with all it started, also when this process is killed: a separate one waits for that.
    """
    log = folder / f"log-{time.monotonic_ns()}.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", script],
            **_typed_in(folder, more),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    watcher = subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), str(process.pid)], start_new_session=True
    )
    try:
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(until, log.read_text())):
            assert process.poll() is None, f"{script}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{script}\n{log.read_text()}"
            time.sleep(0.1)
        yield found
    finally:
        _end(process.pid)
        process.wait()
        watcher.kill()
        watcher.wait()


def _end(leader: int) -> None:
    """Ends a session by its first process; kills what is left of it after 20 s."""
    with suppress(ProcessLookupError):
        ended = os.pidfd_open(leader)
        os.kill(leader, signal.SIGTERM)  # it alone: Ray says good-bye to processes of its own
        select.select([ended], [], [], 20)
        os.close(ended)
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _end_after(parent: int, leader: int) -> None:
    """Ends the session as soon as `parent`, which started this process, has ended."""
    with suppress(ProcessLookupError):  # it has already
        select.select([os.pidfd_open(parent)], [], [])
    _end(leader)


if __name__ == "__main__":
    _end_after(*map(int, sys.argv[1:]))
