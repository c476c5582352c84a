"""What every test runs under: offline, quiet, and not greedy with the machine's cores."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import tempfile

import pytest

# Before any test imports the libraries that read them, and inherited by servers and Ray's workers.
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that would load from a hub fails at once
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # those of transformers too
    RAY_USAGE_STATS_ENABLED="0",
    # A process that has read a token keeps it, whatever home a later test gives to its Ray.
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    OMP_WAIT_POLICY="PASSIVE",  # threads that wait by spinning make several processes crawl
)

# Tests find no model good because it was in an earlier run, and leave nothing in the home.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tune_app-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A job started with `&` ignores Ctrl-C, one with `nohup` a closing terminal, and so would the
# commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts servers is slow, but for the one whole search on a real swarm.

    Files with long tests come first: of two processes that share the files, neither is left with a
    long one at the end."""
    for item in items:
        if item.get_closest_marker("swarm") and item.path.name != "test_search.py":
            item.add_marker(pytest.mark.slow)
    long = {
        item.path
        for item in items
        if any(item.get_closest_marker(name) for name in ("slow", "swarm", "browser"))
    }
    items.sort(key=lambda item: item.path not in long)
