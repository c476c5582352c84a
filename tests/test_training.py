"""The training loop against one written by hand, and what a trial must be able to rely on."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import tune_app.demo
from tests.tiny_models import write_tiny_model
from tests.trials import CLASSES, VOCAB, random_dataset
from tune_app import training
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.optim import build_scheduler
from tune_app.prompts import PromptTunedModel
from tune_app.reports import Report
from tune_app.tasks import DataOrder, Dataset, TaskData
from tune_app.training import TrainingRun, is_of
from tune_app.trial_config import SCHEDULER_ARGUMENTS, TrialConfig

DEMO = Path(tune_app.demo.__file__).parent / "model"
TEXTS = [
    "Return the number of items in the list.",
    "Raise an error if the file does not exist.",
    "A context manager that closes the socket.",
    "Convert a string to an integer.",
    "Open the file for reading in text mode.",
    "The default value is None.",
    "Send all the data that is left to the other end.",
    "Sort the keys and return them as a tuple.",
    "Remove a directory and everything in it.",
    "Wait until the thread terminates.",
    "Parse the arguments of the command line.",
    "Write the message to the log.",
]
CURVE = TrialConfig(lr=0.03, steps=10, batch_size=4, warmup_steps=3, prompt_length=4)
GOLDEN_TRAIN = [2.8554, 2.8521, 2.8218, 2.8257, 2.7899]
GOLDEN_EVAL = [2.5480, 2.5363, 2.5279, 2.5236, 2.5217]


def task_data(task: str, train: Dataset, valid: Dataset, test: Dataset) -> TaskData:
    names = tuple("abc"[:CLASSES]) if task == "classification" else ()
    return TaskData(task, train, valid, test, names, [], "")


@pytest.fixture(scope="module")
def demo():
    return LocalBackbone(DEMO, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def demo_data():
    """Causal LM on fixed sentences, so that no Python version changes them."""
    rows = AutoTokenizer.from_pretrained(DEMO)(TEXTS)["input_ids"]
    return task_data("causal-lm", Dataset(rows[:8]), Dataset(rows[8:10]), Dataset(rows[10:]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)
    return LocalBackbone(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny_data():
    """Task -> random data."""
    lengths = [3 + i * 5 % 9 for i in range(14)]
    return {
        task: task_data(task, *(random_dataset(task, lengths, seed) for seed in range(3)))
        for task in ("causal-lm", "classification")
    }


def make_run(backbone, data: TaskData, config: TrialConfig) -> TrainingRun:
    assert config.check() == []
    run = partial(run_alone, backbone)
    model = PromptTunedModel(backbone, run, data.task, len(data.class_names), config)
    return TrainingRun(model, data, config)


def without_time(report: Report) -> dict:
    """The report but for the wall-clock time in it."""
    return asdict(replace(report, seconds=0.0, usage=report.usage | {"wait_s": 0.0}))


def reports_of(run: TrainingRun, **options) -> list[dict]:
    reports: list[dict] = []
    run.train(lambda report: reports.append(without_time(report)), **options)
    return reports


# ---------------------------------------------------------------------------------- the loop


def test_losses_and_learning_rates_of_a_loop_written_by_hand(demo, demo_data):
    """transformers' own model, plain AdamW and get_scheduler: 5 steps, each reported."""
    config = replace(CURVE, steps=5, warmup_steps=2, weight_decay=0.1)
    run = make_run(demo, demo_data, config)
    prompt = torch.nn.Parameter(run.model.prompt_embeddings.detach().clone())

    model = AutoModelForCausalLM.from_pretrained(DEMO).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([prompt], lr=config.lr, weight_decay=0.1)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=5)
    order = DataOrder(len(demo_data.train), config.batch_size, config.seed)
    losses, rates = [], []
    for step in range(5):
        batch = demo_data.train.batch(order.indices(step))
        text = model.get_input_embeddings()(batch.tokens_BT)
        embeds = torch.cat([prompt.expand(len(text), -1, -1), text], dim=1)
        # no prompt position predicts: neither prompt nor first token are targets
        first = torch.full((len(text), len(prompt) + 1), -100)
        labels = torch.cat([first, batch.labels[:, 1:]], dim=1)
        loss = model(inputs_embeds=embeds, labels=labels).loss
        loss.backward()
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    reports = reports_of(run)
    assert [report["train_loss"] for report in reports] == pytest.approx(losses, rel=1e-5)
    assert [report["learning_rate"] for report in reports] == rates
    torch.testing.assert_close(run.model.prompt_embeddings, prompt, rtol=1e-4, atol=1e-5)


def test_golden_curve(demo, demo_data):
    """Held at a fixed seed: whatever moves these numbers moves every result of a search."""
    reports = reports_of(make_run(demo, demo_data, CURVE))
    assert [report["step"] for report in reports] == [2, 4, 6, 8, 10]
    assert [report["train_loss"] for report in reports] == pytest.approx(GOLDEN_TRAIN, abs=1e-3)
    assert [report["eval_loss"] for report in reports] == pytest.approx(GOLDEN_EVAL, abs=1e-3)


def test_a_report_says_what_happened(tiny, tiny_data):
    data = tiny_data["classification"]
    config = TrialConfig(steps=10, batch_size=4, warmup_steps=0, prompt_length=3)
    reports = reports_of(make_run(tiny, data, config))
    assert [report["step"] for report in reports] == [2, 4, 6, 8, 10]
    # the rate that the last step used: linear from lr to 0
    rates = [1e-3 * (10 - (step - 1)) / 10 for step in (2, 4, 6, 8, 10)]
    assert [report["learning_rate"] for report in reports] == pytest.approx(rates)
    order = DataOrder(len(data.train), 4, 0)
    lengths = [int(data.train.batch(order.indices(step)).lengths_B.sum()) for step in range(10)]
    assert reports[0]["tokens"] == sum(lengths[:2]) + 2 * 4 * 3
    assert reports[-1]["tokens"] == sum(lengths) + 10 * 4 * 3
    for report in reports:
        assert report["objective"] == report["eval_loss"]
        assert 0 <= report["metric"]["accuracy"] <= 1
        assert not report["diverged"]


def test_a_run_that_evaluates_only_at_the_end(tiny, tiny_data):
    config = TrialConfig(steps=7, batch_size=4)
    full = reports_of(make_run(tiny, tiny_data["causal-lm"], config))
    (last,) = reports_of(make_run(tiny, tiny_data["causal-lm"], config), evaluate_on_the_way=False)
    assert last["eval_loss"] == full[-1]["eval_loss"]
    assert last["metric"] == {"perplexity": pytest.approx(math.exp(last["eval_loss"]))}


def test_a_plateau_is_looked_for_even_in_a_run_that_reports_only_its_end(tiny, tiny_data):
    """Else a confirmation would train on with a learning rate that the search had lowered."""
    config = TrialConfig(steps=10, batch_size=4, scheduler="reduce_lr_on_plateau", patience=0)
    config = replace(config, lr=0.3, factor=0.1)
    full = reports_of(make_run(tiny, tiny_data["classification"], config))
    assert full[-1]["learning_rate"] < 0.3  # the plateau was met
    end = reports_of(make_run(tiny, tiny_data["classification"], config), evaluate_on_the_way=False)
    assert end[-1]["eval_loss"] == full[-1]["eval_loss"]


def test_test_metrics_use_the_whole_test_split(tiny, tiny_data):
    data = tiny_data["classification"]
    model = make_run(tiny, data, TrialConfig()).model
    expected = model.evaluate([data.test.batch(range(len(data.test)))])
    metrics = training.test_metrics(model, data)
    assert metrics == {
        "test_loss": pytest.approx(expected.loss),
        "test_accuracy": pytest.approx(expected.metric["accuracy"]),
    }


def test_gradients_are_clipped_where_asked(tiny, tiny_data):
    data, norms = tiny_data["causal-lm"], []
    for most in (None, 1e-3):
        run = make_run(tiny, data, TrialConfig(steps=1, max_grad_norm=most))
        run.optimizer.register_step_pre_hook(
            lambda optimizer, *_: norms.append(
                torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).norm()
            )
        )
        reports_of(run)
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


# --------------------------------------------------------------------------- going on again


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
@pytest.mark.parametrize("scheduler", SCHEDULER_ARGUMENTS)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tiny, tiny_data, scheduler, task, mode):
    config = TrialConfig(
        lr=0.05, scheduler=scheduler, warmup_steps=3, tuning_mode=mode, steps=10, batch_size=4
    )
    if scheduler == "reduce_lr_on_plateau":
        config = replace(config, patience=0, factor=0.5, lr=0.3)
    whole, states = [], []
    run = make_run(tiny, tiny_data[task], config)

    def keep(report):
        whole.append(without_time(report))
        states.append(run.state())

    run.train(keep)
    assert len(whole) == 5
    for done in (1, 3, 5):
        later = make_run(tiny, tiny_data[task], replace(config))
        later.load_state(states[done - 1])
        assert reports_of(later) == whole[done - 1 :]  # the last report is repeated
        for ours, theirs in zip(later.model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_only_what_trains(tiny, tiny_data):
    config = TrialConfig(steps=2, tuning_mode="deep_ptune", prompt_length=4)
    run = make_run(tiny, tiny_data["classification"], config)
    reports_of(run)
    state = run.state()
    trained = sum(parameter.numel() for parameter in run.model.parameters())
    assert trained == 4 * 32 + 4 * 2 * 32 + CLASSES * 32
    assert len(state) < 3 * 4 * trained + 16_000  # values and AdamW's two moments, float32
    loaded = torch.load(io.BytesIO(state), weights_only=True)
    assert set(loaded["model"]) == {"prompt_embeddings", "intermediate_prompt_embeddings", "score"}


def test_an_absurd_learning_rate_is_reported_as_divergence(tiny, tiny_data):
    data = tiny_data["classification"]
    config = TrialConfig(lr=1e4, scheduler="constant", steps=50, batch_size=4)
    reports = reports_of(make_run(tiny, data, config))
    *before, last = reports
    assert last["diverged"]
    assert not any(report["diverged"] for report in before)
    assert last["step"] < 50
    assert math.isfinite(last["objective"])
    healthy = reports_of(make_run(tiny, data, replace(config, lr=1e-3)))
    assert last["objective"] > healthy[-1]["objective"]
    json.dumps(last)


def test_no_run_that_goes_on_counts_worse_than_one_that_diverged(tiny, tiny_data):
    """A loss below the bound for explosions is reported as it is; the penalty is that bound."""
    data = tiny_data["classification"]
    run = make_run(tiny, data, TrialConfig(steps=1))
    run.first_loss = 2.0
    assert not run._has_diverged(19.9)
    assert run._has_diverged(20.1)
    run = make_run(tiny, data, TrialConfig(lr=1e4, scheduler="constant", steps=50))
    last = reports_of(run)[-1]
    assert last["objective"] == 10 * run.first_loss


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_a_first_loss_that_is_no_number(tiny, tiny_data, task):
    run = make_run(tiny, tiny_data[task], TrialConfig(steps=10))
    with torch.no_grad():
        run.model.prompt_embeddings.fill_(math.nan)
    (report,) = reports_of(run)
    assert report["diverged"]
    assert report["step"] == 1
    assert math.isnan(report["train_loss"])
    healthy = reports_of(make_run(tiny, tiny_data[task], TrialConfig(steps=10)))
    assert healthy[-1]["objective"] < report["objective"] < math.inf
    # such a run ends at once when it is gone on with
    again = make_run(tiny, tiny_data[task], TrialConfig(steps=10))
    again.load_state(run.state())
    assert [report["diverged"] for report in reports_of(again)] == [True]


# ------------------------------------------------------------------------ changes on the way

BEFORE = TrialConfig(lr=0.05, warmup_steps=2, steps=10, batch_size=4, weight_decay=0.01)
LATER = {"lr": 0.02, "weight_decay": 0.3, "beta1": 0.5, "beta2": 0.9, "eps": 1e-4}
SCHEDULES = {
    "linear": {},
    "cosine_with_restarts": {"num_cycles": 2.0},
    "polynomial": {"power": 2.0, "lr_end": 1e-3},
    "inverse_sqrt": {"timescale": 3},
    "constant": {},
}


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


# ---------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_the_same_seed_gives_the_same_numbers(tiny, tiny_data, mode):
    config = TrialConfig(steps=6, batch_size=4, tuning_mode=mode, seed=3)
    data = tiny_data["classification"]
    first = reports_of(make_run(tiny, data, config))
    torch.rand(5)  # what others draw changes nothing
    assert reports_of(make_run(tiny, data, config)) == first
    assert reports_of(make_run(tiny, data, replace(config, seed=4))) != first


def test_global_generators_are_left_alone(tiny, tiny_data):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    config = TrialConfig(steps=6, batch_size=4, tuning_mode="deep_ptune")
    reports_of(make_run(tiny, tiny_data["classification"], config))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
