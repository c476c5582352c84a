"""The training loop against one written by hand, and what a trial must be able to rely on."""

from __future__ import annotations

import io
import json
import math
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import tune_app.models.demo
from tests.training_runs import (
    make_run,
    random_data,
    reports_of,
    task_data,
    tiny_backbone,
    without_time,
)
from tests.trials import CLASSES
from tune_app.backbones.local import LocalBackbone
from tune_app.run.trial_config import SCHEDULER_ARGUMENTS, TrialConfig
from tune_app.tasks.data import DataOrder, Dataset
from tune_app.tasks.objectives import OBJECTIVES
from tune_app.train import loop as training
from tune_app.train.checkpoint import read_state
from tune_app.train.loop import evaluation_batches

DEMO = Path(tune_app.models.demo.__file__).parent / "model"
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
    return tiny_backbone(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tiny_data():
    return random_data()


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
        assert 0 <= report["metrics"]["accuracy"] <= 1
        assert not report["diverged"]


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_where_nothing_is_decided_a_few_rows_are_evaluated_and_training_is_the_same(
    tiny, tiny_data, task
):
    config = TrialConfig(steps=10, batch_size=4, lr=0.05)
    data = replace(tiny_data[task], glimpse=5)
    whole = reports_of(make_run(tiny, tiny_data[task], config))
    few = reports_of(make_run(tiny, tiny_data[task], config), deciding=(6, 10))
    assert few == whole  # no glimpse is known
    states, run = [], make_run(tiny, data, config)
    run.train(lambda _: states.append(run.state()), deciding=(6, 10))
    few = reports_of(make_run(tiny, data, config), deciding=(6, 10))
    rows = len(data.judged)
    assert [report["metrics"]["eval_rows"] for report in few] == [5, 5, rows, 5, rows]
    for glimpse, full in zip(few, whole, strict=True):
        assert glimpse["train_loss"] == full["train_loss"]
        is_whole = glimpse["step"] in (6, 10)
        assert (glimpse["eval_loss"] == pytest.approx(full["eval_loss"])) == is_whole
        assert (glimpse["metrics"]["glimpse_loss"] == glimpse["eval_loss"]) != is_whole
    # The few are the first, and each run's last evaluation tells their loss too.
    model = make_run(tiny, data, config)
    model.load_state(states[-1])
    first = model.model.evaluate(evaluation_batches(data.judged, 5, 5))
    assert few[-1]["metrics"]["glimpse_loss"] == pytest.approx(first.loss)
    # From a checkpoint the same rows are taken.
    later = make_run(tiny, data, config)
    later.load_state(states[0])
    assert reports_of(later, deciding=(6, 10)) == few
    # A schedule that looks at the losses gets all of them.
    plateau = replace(config, scheduler="reduce_lr_on_plateau", patience=0)
    with_plateau = reports_of(make_run(tiny, data, plateau), deciding=(6, 10))
    assert with_plateau == reports_of(make_run(tiny, data, plateau))


def test_one_hard_batch_is_no_explosion(tiny, tiny_data, monkeypatch):
    data, config = tiny_data["classification"], TrialConfig(steps=10, batch_size=4)
    run, losses = make_run(tiny, data, config), iter([1.0, 1.0, 1.0, 15.0, *[1.0] * 6])
    step = run._train_step
    monkeypatch.setattr(run, "_train_step", lambda batch: (step(batch), next(losses))[1])
    assert not any(report["diverged"] for report in reports_of(run))
    run, losses = make_run(tiny, data, config), iter([1.0, 1.0, 1.0, 150.0])
    monkeypatch.setattr(run, "_train_step", lambda batch: (step(batch), next(losses))[1])
    assert reports_of(run)[-1]["diverged"]


def test_a_run_that_evaluates_only_at_the_end(tiny, tiny_data):
    config = TrialConfig(steps=7, batch_size=4)
    full = reports_of(make_run(tiny, tiny_data["causal-lm"], config))
    (last,) = reports_of(make_run(tiny, tiny_data["causal-lm"], config), evaluate_on_the_way=False)
    assert last["eval_loss"] == full[-1]["eval_loss"]
    assert last["metrics"]["perplexity"] == pytest.approx(math.exp(last["eval_loss"]))


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
    rows: list[dict[str, float]] = []
    metrics = training.test_metrics(model, data, rows)
    assert metrics == {
        "test_loss": pytest.approx(expected.loss),
        "test_accuracy": pytest.approx(expected.metric["accuracy"]),
        "test_f1": pytest.approx(expected.metric["f1"]),
    }
    # Each row alone, in the order of the split; together they are the whole split.
    alone = model.evaluate([data.test.batch([1])])
    assert rows[1]["loss"] == pytest.approx(alone.loss, rel=1e-5)
    names = {name for row in rows for name in row}
    total = {name: sum(row.get(name, 0) for row in rows) for name in names}
    for name in data.task.objectives:
        assert OBJECTIVES[name].value(total) == pytest.approx(metrics[f"test_{name}"])


def test_the_rows_of_a_language_model_add_up_over_tokens(tiny, tiny_data):
    data = tiny_data["causal-lm"]
    rows: list[dict[str, float]] = []
    metrics = training.test_metrics(make_run(tiny, data, TrialConfig()).model, data, rows)
    total = {name: sum(row[name] for row in rows) for name in ("loss", "targets")}
    assert len(rows) == len(data.test)
    for name in data.task.objectives:
        assert OBJECTIVES[name].value(total) == pytest.approx(metrics[f"test_{name}"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_minimised_is_the_objective_and_divergence_is_no_better(tiny, tiny_data, name):
    data = tiny_data["causal-lm" if name == "perplexity" else "classification"]
    objective, config = OBJECTIVES[name], TrialConfig(steps=2, lr=1e-3)
    run = make_run(tiny, data, config)
    run.objective = objective
    report = reports_of(run)[-1]
    value = report["eval_loss"] if name == "loss" else report["metrics"][name]
    assert report["objective"] == pytest.approx(1 - value if objective.higher_is_better else value)

    run = make_run(tiny, data, replace(config, lr=1e6, warmup_steps=0))
    run.objective = objective
    run.first_loss = 1e-3  # so that it has exploded
    worst = reports_of(run)[-1]
    assert worst["diverged"]
    assert math.isfinite(worst["objective"])
    for cost in map(objective.cost, (0.0, 1.0) if objective.higher_is_better else (0.01,)):
        assert worst["objective"] >= cost


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
    elif scheduler == "warmup_stable_decay":
        config = replace(config, num_decay_steps=4)
    elif "min_lr" in scheduler:
        config = replace(config, min_lr_rate=0.1)
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


def with_pickle(content: bytes) -> bytes:
    """A file of torch's with this as its pickled part."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({"model": {}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return changed.getvalue()


@pytest.mark.parametrize(
    "checkpoint",
    [
        b"",
        b"torn",
        with_pickle(b""),
        with_pickle(b"\x80\x02q\x00."),
        with_pickle(b"\x80\x02K\x07."),
    ],
    ids=["empty", "not torch's", "nothing in it", "asks an empty stack", "a number"],
)
def test_a_damaged_checkpoint_has_one_error(checkpoint: bytes):
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        read_state(checkpoint)


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
