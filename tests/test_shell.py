"""What the tests start in the background ends with them, however they end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shell import background

SCRIPT = "trap 'echo ended in order; exit' TERM; sleep 1000 & echo sleeper $!; wait"
TESTS = """
import sys, time
from pathlib import Path
from shell import background
with background(sys.argv[1], Path.cwd(), r"sleeper (\\d+)") as found:
    print(found[1], flush=True)
    time.sleep(1000)
"""


def has_ended(process: int) -> bool:
    """Waits for it for a while. `process`: a pidfd, so that no other process can have its id."""
    return bool(select.select([process], [], [], 20)[0])


def test_a_script_ends_with_its_block(tmp_path: Path) -> None:
    with background(SCRIPT, tmp_path, r"sleeper (\d+)") as found:
        sleeper = os.pidfd_open(int(found[1]))
    assert has_ended(sleeper)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_ends_with_tests_that_are_killed(tmp_path: Path, by: signal.Signals) -> None:
    command = [sys.executable, "-c", TESTS, SCRIPT]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=here
    ) as tests:
        assert tests.stdout is not None
        sleeper = os.pidfd_open(int(tests.stdout.readline()))
        tests.send_signal(by)
    assert has_ended(sleeper)
    (log,) = tmp_path.glob("log-*.txt")
    assert "ended in order" in log.read_text()
