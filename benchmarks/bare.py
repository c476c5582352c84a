"""Arms A and B: the training loop by itself, packed or one trial after another; no Ray, no threads.

A is the limit that a search can come close to.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.workload import Workload


def run(workload: Workload, at_once: int) -> dict[str, Any]:
    """Trains the trials in groups of `at_once`, the rows of a group in one pack.

    Timed: all of the training, with the backbone open and the data loaded.
    """
    import torch

    from tune_app.backbones.opening import open_backbone
    from tune_app.serve.connection import connection_to

    torch.set_num_threads(torch.get_num_threads())
    config = workload.search_config(at_once)
    connection = connection_to(config, workload.model, None)
    backbone = open_backbone(config, str(workload.model), connection)
    data, configs = workload.data(), workload.trial_configs()
    began = time.monotonic()
    losses: list[float] = []
    for first in range(0, len(configs), at_once):
        losses += _train_together(backbone, data, configs[first : first + at_once])
    seconds = time.monotonic() - began
    backbone.close()
    return {
        "seconds": seconds,
        "losses": losses,
        "rows_per_s": workload.training_rows / seconds,
    }


def _train_together(backbone, data, configs) -> list[float]:
    """The final evaluation loss of each trial; all of them have the same number of steps."""
    from tune_app.run.trial_report import evaluation_steps
    from tune_app.tasks.data import DataOrder
    from tune_app.train.optim import build_optimizer, build_scheduler
    from tune_app.train.prompt_model import PromptTunedModel

    models = [
        PromptTunedModel(backbone, None, data.task, data.outputs, config) for config in configs
    ]
    optimizers = [
        build_optimizer(model.parameters(), config)
        for model, config in zip(models, configs, strict=True)
    ]
    schedulers = [
        build_scheduler(optimizer, config)
        for optimizer, config in zip(optimizers, configs, strict=True)
    ]
    orders = [DataOrder(len(data.train), config.batch_size, config.seed) for config in configs]
    valid = data.valid.batch(range(len(data.valid)))
    losses: list[float] = []
    for step in range(configs[0].steps):
        batches = [data.train.batch(order.indices(step)) for order in orders]
        answers = _one_pack(backbone, models, batches, needs_grad=True)
        for model, answer in zip(models, answers, strict=True):
            model.prompt_embeddings.grad = answer.prompt_PH
            if model.score is not None:
                (model.score.grad,) = answer.head_parameters
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if step + 1 in evaluation_steps(configs[0].steps):
            answers = _one_pack(backbone, models, [valid] * len(models), needs_grad=False)
            losses = [answer.loss for answer in answers]
    return losses


def _one_pack(backbone, models, batches, *, needs_grad: bool):
    """All requests in one call; Petals' client cuts it into chunks and sends them together."""
    from tune_app.backbones.packing import plan, run_pack
    from tune_app.backbones.protocol import PackLimits

    requests = [
        model.request(batch, needs_grad=needs_grad)
        for model, batch in zip(models, batches, strict=True)
    ]
    sizes = [(request.rows, request.row_tokens) for request in requests]
    (parts,) = plan(sizes, PackLimits(tokens_per_pack=1_000_000, packs_in_flight=1))
    answers = run_pack(backbone, requests, parts)
    if wrong := next((answer for answer in answers if isinstance(answer, Exception)), None):
        raise wrong
    return answers
