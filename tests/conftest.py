"""What every test runs under: offline, quiet, and not greedy with the machine's cores."""

from __future__ import annotations

import os
import signal

# Before any test imports the libraries that read them, and inherited by servers and Ray's workers.
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that would load from a hub fails at once
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    RAY_USAGE_STATS_ENABLED="0",
)

# A job started with `&` ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
