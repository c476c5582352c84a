"""How many trials train concurrently, and in how many processes."""

from __future__ import annotations

import os
from pathlib import Path

from tune_app.run.search_config import SearchConfig

# With more, most configs would be suggested before any trial has ended (benchmarks/README.md).
_MOST_TRIALS_AT_ONCE = 16
_SHARE_AT_ONCE = 3  # a third of the search
# Two hosts with one CPU each train a quarter more rows than one host with two, because threads need
# not wait for each other after each kernel. But every host loads torch and the model.
_TRIALS_PER_CPU_HOST = 4
_LARGE_MODEL = 2**30  # bytes; of a larger model there is only one copy


def most_trials_at_once(config: SearchConfig) -> int:
    """Upper bound, known before the hosts report how much they can pack.

    Fewer trials may already fill the packs.
    """
    if config.scheduler == "pbt":  # the whole population
        return config.trials
    if config.concurrency is not None:
        return min(config.concurrency, config.trials)
    share = min(_MOST_TRIALS_AT_ONCE, config.trials // _SHARE_AT_ONCE)
    return min(max(2, share), config.trials)


def trials_at_once(config: SearchConfig, tokens_in_flight: int) -> int:
    """--concurrency if given; otherwise enough trials to fill the packs, within the upper bound.

    tokens_in_flight: padded tokens that all hosts together compute concurrently (`Cluster`)
    """
    if config.concurrency is not None:
        return config.concurrency
    row_tokens = config.prompt_length + config.max_length
    to_fill = -(-tokens_in_flight // (config.batch_size * row_tokens))
    return min(max(2, to_fill), most_trials_at_once(config))


def runs_at_once(config: SearchConfig) -> int:
    """Like `trials_at_once`, but for confirmation runs.

    Nothing is suggested there, so all of them may run together: with 12 runs, running 10 and then
    the last 2 on their own is slower than letting all 12 share packs.
    """
    return config.concurrency or _MOST_TRIALS_AT_ONCE


def hosts_on_cpu(config: SearchConfig, model: Path) -> int:
    """The number of trial hosts for a backbone on this machine's CPUs."""
    weights = [*model.glob("*.safetensors"), *model.glob("*.bin")]
    if sum(file.stat().st_size for file in weights) > _LARGE_MODEL:
        return 1
    return max(1, min(os.cpu_count() or 1, most_trials_at_once(config) // _TRIALS_PER_CPU_HOST))
