"""What every test runs under: offline, quiet, and not greedy with the machine's cores."""

from __future__ import annotations

import os

# Before any test imports the libraries that read them, and inherited by servers and Ray's workers.
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that would load from a hub fails at once
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    RAY_USAGE_STATS_ENABLED="0",
)
