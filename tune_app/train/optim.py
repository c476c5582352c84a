"""AdamW over what requires a gradient, and transformers' learning-rate schedules."""

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

    Raises ValueError where there is none: such a run would train nothing and say nothing.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "an optimizer needs at least one parameter with requires_grad, received none; "
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
    if "num_decay_steps" in own:  # it would begin before the warmup ends
        own["num_decay_steps"] = min(own["num_decay_steps"], config.steps - warmup)
    # A warmup over the whole run leaves nothing to decay over, and polynomial divides by its length
    # after the last step. One more step changes no learning rate that is used.
    length = max(config.steps, warmup + 1)
    return get_scheduler(config.scheduler, optimizer, warmup, length, own)


def change(
    optimizer: torch.optim.Optimizer, config: TrialConfig, step: int
) -> LRScheduler | ReduceLROnPlateau:
    """Lets the optimizer go on by `config`, after `step` steps, with the moments that it has.

    The schedule that comes back stands where it would had it run by `config` from the beginning.
    A plateau's does not depend on the steps: it begins anew, at `config.lr`.
    """
    optimizer.defaults["lr"] = config.lr  # from which transformers' polynomial takes it
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
