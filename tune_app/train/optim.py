"""AdamW over the parameters that require a gradient, and transformers' learning rate schedules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler

from tune_app.run.search_config import SCHEDULER_ARGUMENTS, TrialConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrialConfig
) -> torch.optim.AdamW:
    """AdamW over the parameters with `requires_grad`.

    Raises ValueError if there is none: such a run would silently train nothing.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "an optimizer needs at least one parameter with requires_grad, got none; "
            "is the prompt frozen?"
        )
    return torch.optim.AdamW(
        trainable,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrialConfig
) -> LRScheduler | ReduceLROnPlateau:
    """The schedule of `config.scheduler` over `config.steps` steps."""
    own = {
        name: value
        for name in SCHEDULER_ARGUMENTS[config.scheduler]
        if (value := getattr(config, name)) is not None
    }
    warmup = config.num_warmup_steps()
    if "num_decay_steps" in own:  # otherwise the decay could start before the warmup ends
        own["num_decay_steps"] = min(own["num_decay_steps"], config.steps - warmup)
    # If the warmup takes the whole run, there are no decay steps, and polynomial divides by their
    # number after the last step. One more step changes no learning rate that is used.
    length = max(config.steps, warmup + 1)
    return get_scheduler(config.scheduler, optimizer, warmup, length, own)


def change(
    optimizer: torch.optim.Optimizer, config: TrialConfig, step: int
) -> LRScheduler | ReduceLROnPlateau:
    """Makes the optimizer continue with `config` after `step` steps, with its present moments.

    Returns a schedule in the state that it would have if `config` had applied from the start.
    reduce_lr_on_plateau does not depend on the step: it starts again at `config.lr`.
    """
    optimizer.defaults["lr"] = config.lr  # transformers' polynomial reads it there
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.lr
        group["betas"] = (config.beta1, config.beta2)
        group["eps"], group["weight_decay"] = config.eps, config.weight_decay
    scheduler = build_scheduler(optimizer, config)
    if isinstance(scheduler, LambdaLR):  # a function of the step
        scheduler.last_epoch = step
        factors = [factor(step) for factor in scheduler.lr_lambdas]
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = config.lr * factor
    return scheduler
