"""AdamW over what requires a gradient, and transformers' learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

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
    """The schedule of `config.scheduler` over `config.steps` steps.

    `get_scheduler` of transformers 4.34 passes on neither num_cycles nor power, so a schedule with
    arguments of its own is built by the function that get_scheduler would call.
    """
    own = {
        name: value
        for name in SCHEDULER_ARGUMENTS[config.scheduler]
        if (value := getattr(config, name)) is not None
    }
    if config.scheduler == "reduce_lr_on_plateau":
        return ReduceLROnPlateau(optimizer, **own)
    warmup = config.num_warmup_steps()
    # A warmup over the whole run leaves nothing to decay over, and polynomial divides by its length
    # after the last step. One more step changes no learning rate that is used.
    length = max(config.steps, warmup + 1)
    if not own:
        return get_scheduler(config.scheduler, optimizer, warmup, length)
    build = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(config.scheduler)]
    if config.scheduler == "inverse_sqrt":
        return build(optimizer, warmup, **own)
    return build(optimizer, warmup, length, **own)


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
