"""How many trials train at once, and in how many processes."""

from __future__ import annotations

import os
from pathlib import Path

from tune_app.run.search_config import SearchConfig

# More would be suggested before any has ended: TPE needs a third fewer tokens with 1 or 2 at once
# than with 8 (benchmarks/README.md).
_MOST_TRIALS_AT_ONCE = 16
_SHARE_AT_ONCE = 3  # a third of the search
# Two hosts with a processor each train a quarter more rows than one with both: no thread waits for
# another one after each kernel. But each loads torch and the model.
_TRIALS_PER_CPU_HOST = 4
_LARGE_MODEL = 2**30  # bytes, of which one copy is enough


def most_trials_at_once(config: SearchConfig) -> int:
    """What is known before the hosts are: with fewer, their packs may be full already."""
    if config.scheduler == "pbt":  # the whole population
        return config.trials
    if config.concurrency is not None:
        return min(config.concurrency, config.trials)
    share = min(_MOST_TRIALS_AT_ONCE, config.trials // _SHARE_AT_ONCE)
    return min(max(2, share), config.trials)


def trials_at_once(config: SearchConfig, tokens_in_flight: int) -> int:
    """--concurrency, or so many that they fill the packs and that most suggestions follow results.

    tokens_in_flight: padded tokens that all hosts together compute at once (`Cluster`)
    """
    if config.concurrency is not None:
        return config.concurrency
    row_tokens = config.prompt_length + config.max_length
    to_fill = -(-tokens_in_flight // (config.batch_size * row_tokens))
    return min(max(2, to_fill), most_trials_at_once(config))


def runs_at_once(config: SearchConfig) -> int:
    """The same for a confirmation, where nothing is suggested: that of 12 runs the last two train
    by themselves takes longer than that all of them take turns."""
    return config.concurrency or _MOST_TRIALS_AT_ONCE


def hosts_on_cpu(config: SearchConfig, model: Path) -> int:
    """Trial hosts for a backbone on this machine's processors."""
    weights = [*model.glob("*.safetensors"), *model.glob("*.bin")]
    if sum(file.stat().st_size for file in weights) > _LARGE_MODEL:
        return 1
    return max(1, min(os.cpu_count() or 1, most_trials_at_once(config) // _TRIALS_PER_CPU_HOST))
