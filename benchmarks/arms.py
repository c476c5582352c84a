"""The arms of the benchmark, each run in a process of its own.

python -m benchmarks.arms ARM WORKLOAD_JSON RESULT_FILE
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bare, plain_ray, tune
from benchmarks.workload import Workload

_KINDS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "A": ("bare packed loop", bare.run),
    "B": ("bare loop, one after another", lambda workload, at_once: bare.run(workload, 1)),
    "E": ("plain Ray Tune", lambda *given: plain_ray.run(*given, reuse_actors=False)),
    "R": ("plain Ray Tune, reuse_actors", lambda *given: plain_ray.run(*given, reuse_actors=True)),
    "F": ("tune_app", tune.run),
}
# By name: the kind and how many trials run at once.
ARMS = ("A8", "A16", "B1", "E2", "E4", "E8", "R2", "R4", "R8", "F8", "F16")


def describe(arm: str) -> str:
    """The arm in words.

    >>> describe("E4")
    'plain Ray Tune, 4 at once'
    """
    words = _KINDS[arm[0]][0]
    return words if arm[0] == "B" else f"{words}, {arm[1:]} at once"


def run(arm: str, workload: Workload) -> dict[str, Any]:
    """seconds of the search, final evaluation loss of each trial, and the arm's own figures."""
    return _KINDS[arm[0]][1](workload, int(arm[1:]))


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    arm, workload, file = sys.argv[1], Workload.from_json(sys.argv[2]), sys.argv[3]
    if workload.peers:  # or the bare loop's threads spin on the server's processors: twice as slow
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    Path(file).write_text(json.dumps(run(arm, workload)))


if __name__ == "__main__":
    main()
