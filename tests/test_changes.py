"""A trial whose config changes while it trains, against PyTorch's optimizer changed by hand."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from tests.training_runs import make_run, random_data, reports_of, tiny_backbone, without_time
from tune_app.run.trial_config import TrialConfig
from tune_app.tasks.data import DataOrder
from tune_app.train.checkpoint import is_of
from tune_app.train.optim import build_scheduler

BEFORE = TrialConfig(lr=0.05, warmup_steps=2, steps=10, batch_size=4, weight_decay=0.01)
LATER = {"lr": 0.02, "weight_decay": 0.3, "beta1": 0.5, "beta2": 0.9, "eps": 1e-4}
SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"num_cycles": 2.0},
    "polynomial": {"power": 2.0, "lr_end": 1e-3},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 5, "decay_type": "linear"},
    "constant": {},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tiny_data():
    return random_data()


def changed(step: int, **values: object) -> TrialConfig:
    return replace(BEFORE, changes=tuple((step, name, value) for name, value in values.items()))


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_a_change_is_torchs_own_adamw_with_other_values_from_there(tiny, tiny_data, scheduler):
    """By hand: the moments stay, and the schedule stands where it would had it always run so."""
    data = tiny_data["classification"]
    config = changed(4, scheduler=scheduler, **SCHEDULES[scheduler], **LATER)
    run = make_run(tiny, data, config)
    hand = make_run(tiny, data, BEFORE)
    parameters = list(hand.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=BEFORE.lr, weight_decay=BEFORE.weight_decay)
    dummy = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LATER["lr"])
    schedule = build_scheduler(dummy, config.at(4))
    later = []
    for _ in range(10):
        later.append(dummy.param_groups[0]["lr"])
        dummy.step()
        schedule.step()
    rates = [0.05 * (step / 2 if step < 2 else (10 - step) / 8) for step in range(4)] + later[4:]
    order = DataOrder(len(data.train), 4, 0)
    for step, rate in enumerate(rates):
        (group,) = optimizer.param_groups
        group["lr"] = rate
        if step == 4:
            group |= {"weight_decay": 0.3, "betas": (0.5, 0.9), "eps": 1e-4}
        hand.model(data.train.batch(order.indices(step))).backward()
        optimizer.step()
        optimizer.zero_grad()

    reports = reports_of(run)

    assert [r["learning_rate"] for r in reports] == pytest.approx(
        [rates[i] for i in (1, 3, 5, 7, 9)]
    )
    for ours, theirs in zip(run.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert reports[:2] == reports_of(make_run(tiny, data, BEFORE))[:2]


def test_a_change_to_what_holds_already_changes_nothing(tiny, tiny_data):
    data = tiny_data["causal-lm"]
    assert reports_of(make_run(tiny, data, changed(4, lr=0.05))) == reports_of(
        make_run(tiny, data, BEFORE)
    )


@pytest.mark.parametrize("scheduler", [*SCHEDULES, "reduce_lr_on_plateau"])
def test_a_run_with_changes_goes_on_from_any_checkpoint(tiny, tiny_data, scheduler):
    """The one written just before a change too, and as another run that ends like this one."""
    data = tiny_data["classification"]
    own = {"patience": 0} if scheduler == "reduce_lr_on_plateau" else SCHEDULES[scheduler]
    config = changed(4, scheduler=scheduler, lr=0.3, max_grad_norm=0.5, **own)
    whole, states = [], []
    run = make_run(tiny, data, config)
    run.train(lambda report: (whole.append(without_time(report)), states.append(run.state())))
    for done in range(1, 6):
        later = make_run(tiny, data, config)
        later.load_state(states[done - 1])
        assert reports_of(later) == whole[done - 1 :]
        assert is_of(states[done - 1], config)
        assert not is_of(states[done - 1], BEFORE)

    former = make_run(tiny, data, BEFORE)
    kept = []
    former.train(lambda _: kept.append(former.state()))
    other = make_run(tiny, data, config)
    other.take_over(kept[1], spent=None)
    assert reports_of(other) == whole[1:]
    if scheduler == "reduce_lr_on_plateau":
        *_, end = reports_of(make_run(tiny, data, config), evaluate_on_the_way=False)
        assert end["eval_loss"] == whole[-1]["eval_loss"]


def test_what_was_spent_before_a_take_over_stays_spent(tiny, tiny_data):
    data = tiny_data["classification"]
    mine = make_run(tiny, data, replace(BEFORE, batch_size=2, prompt_length=3))
    states, theirs = [], []
    mine.train(lambda _: states.append(mine.state()))
    other = make_run(tiny, data, BEFORE)
    other.train(lambda _: theirs.append(other.state()))

    run = make_run(tiny, data, changed(4, lr=0.01))
    run.take_over(theirs[1], spent=states[1])
    repeated, *_, last = reports_of(run)

    tokens = torch.load(io.BytesIO(states[1]), weights_only=True)["tokens"]
    after_4 = torch.load(io.BytesIO(theirs[1]), weights_only=True)
    assert repeated["tokens"] == tokens < after_4["tokens"]
    assert repeated["eval_loss"] == after_4["last_report"]["eval_loss"]
    assert last["tokens"] == tokens + other.tokens - after_4["tokens"]
