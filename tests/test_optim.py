"""Optimizer and schedules against torch's and transformers' own, step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from tune_app.run.trial_config import SCHEDULER_ARGUMENTS, TrialConfig
from tune_app.train.optim import build_optimizer, build_scheduler

STEPS = 37
# All but greedy, whose step wants a loss each time.
NAMES = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.GREEDY]
# What transformers has no default for.
REQUIRED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 0},
}


def parameters(*flags: bool) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2), requires_grad=flag) for flag in flags]


def learning_rates(optimizer, scheduler, losses=None) -> list[float]:
    """The learning rate that each step uses; ReduceLROnPlateau is fed with the losses."""
    rates = []
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([] if losses is None else [losses[step]]))
    return rates


def ours(config: TrialConfig, losses=None) -> list[float]:
    optimizer = build_optimizer(parameters(True), config)
    return learning_rates(optimizer, build_scheduler(optimizer, config), losses)


def theirs(build, losses=None, lr=0.01) -> list[float]:
    optimizer = torch.optim.AdamW(parameters(True), lr=lr)
    return learning_rates(optimizer, build(optimizer), losses)


def config_of(name: str, **values) -> TrialConfig:
    values = REQUIRED.get(name, {}) | values
    config = TrialConfig(lr=0.01, scheduler=name, steps=STEPS, **values)
    assert config.check() == []
    return config


def test_every_name_of_transformers_is_known():
    assert sorted(NAMES) == sorted(SCHEDULER_ARGUMENTS)
    assert len(NAMES) == 11


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("warmup", "steps"),
    [({"warmup_steps": 5}, 5), ({"warmup_steps": 100}, STEPS), ({"warmup_ratio": 0.1}, 4)],
    ids=["steps", "longer than the run", "ratio"],
)
def test_learning_rates_are_those_of_get_scheduler(name, warmup, steps):
    # a loss that stops falling, so that the plateau is met
    losses = [max(1.0, 3 - i / 5) for i in range(STEPS)] if "plateau" in name else None
    # transformers' polynomial divides by 0 after the last step where all of the run is warmup
    length = STEPS + 1 if steps == STEPS else STEPS
    expected = theirs(
        lambda optimizer: get_scheduler(name, optimizer, steps, length, REQUIRED.get(name)), losses
    )
    assert ours(config_of(name, **warmup), losses) == expected
    if name != "constant":
        assert len(set(expected)) > 1


def test_linear_is_written_out_once():
    """Against the formula, lest both sides share a mistake: 10 steps up, then down to 0."""
    rates = ours(config_of("linear", warmup_steps=10))
    expected = [0.01 * min(i / 10, (STEPS - i) / (STEPS - 10)) for i in range(STEPS)]
    assert rates == pytest.approx(expected)


OWN_ARGUMENTS = {
    "cosine": ("get_cosine_schedule_with_warmup", {"num_cycles": 1.5}),
    "cosine_with_restarts": (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_cycles": 3},
    ),
    "polynomial": (
        "get_polynomial_decay_schedule_with_warmup",
        {"power": 2.0, "lr_end": 0.001},
    ),
    "inverse_sqrt": ("get_inverse_sqrt_schedule", {"timescale": 7}),
    "cosine_with_min_lr": (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_cycles": 1.5, "min_lr_rate": 0.3},
    ),
    "cosine_warmup_with_min_lr": (
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        {"num_cycles": 1.5, "min_lr_rate": 0.3, "warmup_lr_rate": 0.2},
    ),
    "warmup_stable_decay": (
        "get_wsd_schedule",
        {
            "num_decay_steps": 10,
            "warmup_type": "cosine",
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.2,
            "num_cycles": 1.5,
        },
    ),
}


@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_own_arguments_reach_the_schedule(name):
    function, arguments = OWN_ARGUMENTS[name]

    def build(optimizer):
        length = {} if name == "inverse_sqrt" else {"num_training_steps": STEPS}
        build_theirs = getattr(transformers.optimization, function)
        return build_theirs(optimizer, num_warmup_steps=5, **length, **arguments)

    config = config_of(name, warmup_steps=5)
    rates = ours(TrialConfig.from_dict(arguments, config))
    assert rates == theirs(build)
    assert rates != ours(config)


def test_own_arguments_reach_reduce_lr_on_plateau():
    losses = [1.0] * STEPS
    rates = ours(config_of("reduce_lr_on_plateau", factor=0.5, patience=2), losses)
    assert rates == theirs(
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=2
        ),
        losses,
    )
    assert rates[4:8] == [0.005, 0.005, 0.005, 0.0025]


def test_warmup_stable_decay_is_written_out_once():
    """10 steps up, then level, and the last 12 down to a tenth."""
    decays = {"num_decay_steps": 12, "decay_type": "linear", "min_lr_ratio": 0.1}
    rates = ours(config_of("warmup_stable_decay", warmup_steps=10, **decays))
    up = [0.01 * (0.1 + 0.9 * i / 10) for i in range(10)]
    down = [0.01 * (0.1 + 0.9 * (1 - i / 12)) for i in range(12)]
    assert rates == pytest.approx([*up, *[0.01] * (STEPS - 22), *down])


def test_the_decay_is_at_most_what_the_warmup_leaves():
    rates = ours(config_of("warmup_stable_decay", warmup_steps=30, num_decay_steps=20))
    assert rates == ours(config_of("warmup_stable_decay", warmup_steps=30, num_decay_steps=7))
    assert rates[30] == 0.01
    assert rates.count(0.01) == 1


@pytest.mark.parametrize("steps", [7, 10, 33, 100, 401])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.06, 0.07, 0.1, 0.5])
def test_a_warmup_ratio_is_rounded_as_in_transformers(steps, ratio, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True)
    config = TrialConfig(steps=steps, warmup_ratio=ratio)
    assert config.num_warmup_steps() == arguments.get_warmup_steps(steps)


def test_adamw_gets_every_option():
    config = TrialConfig(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, amsgrad=True)
    optimizer = build_optimizer(parameters(True), config)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    expected = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}
    assert {name: group[name] for name in expected} == expected


def test_the_default_is_the_reference_setup():
    (group,) = build_optimizer(parameters(True), TrialConfig()).param_groups
    assert (group["lr"], group["weight_decay"], group["amsgrad"]) == (1e-3, 0.0, False)
    reference = torch.optim.AdamW(parameters(True))
    assert (group["betas"], group["eps"]) == (
        reference.defaults["betas"],
        reference.defaults["eps"],
    )


def test_adamw_steps_as_written_in_the_paper():
    """Two steps of Loshchilov & Hutter's algorithm 2 by hand, weight decay decoupled."""
    config = TrialConfig(lr=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99)
    (weight,) = parameters(True)
    optimizer = build_optimizer([weight], config)
    x, m, v = 1.0, 0.0, 0.0
    for step, grad in enumerate([2.0, -1.0], start=1):
        weight.grad = torch.full((2,), grad)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad**2
        update = m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-8)
        x = x - 0.1 * 0.5 * x - 0.1 * update
        assert weight.tolist() == pytest.approx([x, x])


def test_only_what_requires_a_gradient_is_optimised():
    free, frozen, other = parameters(True, False, True)
    optimizer = build_optimizer([free, frozen, other], TrialConfig())
    optimised = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert optimised == [id(free), id(other)]


@pytest.mark.parametrize("given", [[], parameters(False, False)], ids=["none", "all frozen"])
def test_an_optimizer_over_nothing_is_an_error(given):
    with pytest.raises(ValueError, match="at least one parameter with requires_grad"):
        build_optimizer(given, replace(TrialConfig(), lr=0.1))
