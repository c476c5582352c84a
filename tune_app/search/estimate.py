"""How long a search takes and what memory it needs, from a training step that is measured here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import deciding_steps, evaluation_steps
from tune_app.search.concurrency import trials_at_once
from tune_app.serve.connection import Connection

if TYPE_CHECKING:
    from tune_app.tasks.data import TaskData

_CHEAP = 2**30  # bytes of weights; they are loaded in a few seconds
_TIMES = 3  # the first one, in which memory is allocated, does not count


@dataclass(frozen=True)
class Estimate:
    """Of this machine, with the model in one process.

    at_once: trials that share a pack
    trial_s, run_s: seconds that a trial, or a run that confirms one, adds to the search
    memory: bytes that the process takes
    """

    device: str
    at_once: int
    trial_s: float
    run_s: float
    memory: int


def estimate(config: SearchConfig, model: Path, data: TaskData) -> Estimate | None:
    """None where the model is too large to be loaded for this, or is served by other machines."""
    if config.peers or _bytes_of(model) > _CHEAP:
        return None
    import torch

    from tune_app.backbones.opening import open_backbone
    from tune_app.backbones.packer import run_alone
    from tune_app.train.loop import EVALUATION_ROWS, evaluation_batches
    from tune_app.train.prompt_model import PromptTunedModel

    backbone = open_backbone(replace(config, backbone="local"), str(model), Connection())
    limits, trial = backbone.limits, config.base_trial()
    at_once = trials_at_once(config, limits.tokens_per_pack * limits.packs_in_flight)
    row_tokens = config.prompt_length + config.max_length
    rows = min(at_once * config.batch_size, limits.rows(row_tokens), len(data.train))
    training = data.train.batch(range(rows))
    judged = evaluation_batches(data.judged, EVALUATION_ROWS)
    network = PromptTunedModel(
        backbone, partial(run_alone, backbone), data.task, data.outputs, trial, data.start
    )
    train_s = _seconds(lambda: network(training).backward()) / rows  # of a row
    judge_s = _seconds(lambda: network.evaluate(judged))
    row_s = judge_s / len(data.judged)
    test_s = row_s * len(data.test)
    trained_s = config.steps * config.batch_size * train_s
    device = str(backbone.device)
    memory = torch.cuda.max_memory_allocated() if device.startswith("cuda") else _memory()
    backbone.close()
    return Estimate(
        device=device,
        at_once=at_once,
        trial_s=trained_s + _evaluated_rows(config, data) * row_s,
        run_s=trained_s + judge_s + test_s,
        memory=memory,
    )


def _evaluated_rows(config: SearchConfig, data: TaskData) -> int:
    """Of all evaluations of a trial; those that decide nothing take few."""
    deciding = deciding_steps(config.scheduler, config.steps)
    return sum(
        data.glimpse if data.glimpse is not None and step not in deciding else len(data.judged)
        for step in evaluation_steps(config.steps)
    )


def _bytes_of(model: Path) -> int:
    weights = [*model.glob("*.safetensors"), *model.glob("*.bin")]
    return sum(file.stat().st_size for file in weights)


def _seconds(work: Callable[[], Any]) -> float:
    took = []
    for _ in range(_TIMES + 1):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return median(took[1:])


def _memory() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
