"""The prompt-tuned model: what it trains, how it starts, and that its gradients are true ones."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.tiny_models import write_tiny_model
from tests.trials import (
    CLASSES,
    MIXED,
    NAMES,
    VOCAB,
    float64_throughout,
    make_trial,
    random_dataset,
)
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.run.trial_config import TrialConfig
from tune_app.tasks.known import TASKS
from tune_app.train.prompt_model import PromptTunedModel

HIDDEN, BLOCKS = 32, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)


@pytest.fixture(scope="module")
def backbone(folder):
    return LocalBackbone(folder, device="cpu", dtype="float32")


def model_of(backbone, task="causal-lm", **values) -> PromptTunedModel:
    run = partial(run_alone, backbone)
    return PromptTunedModel(
        backbone, run, TASKS[task], TASKS[task].outputs(NAMES), TrialConfig(**values)
    )


@pytest.mark.parametrize(
    ("task", "mode", "shapes"),
    [
        ("causal-lm", "ptune", {"prompt_embeddings": (5, HIDDEN)}),
        (
            "classification",
            "deep_ptune",
            {
                "prompt_embeddings": (5, HIDDEN),
                "intermediate_prompt_embeddings": (5, BLOCKS * HIDDEN),
                "score": (CLASSES, HIDDEN),
            },
        ),
    ],
)
def test_parameters_have_the_shapes_of_petals(backbone, task, mode, shapes):
    model = model_of(backbone, task, tuning_mode=mode, prompt_length=5)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert model.state_dict().keys() == shapes.keys()  # the backbone is no part of it
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_prompts_start_as_nn_embedding_does(backbone):
    prompt = model_of(backbone, prompt_length=64).prompt_embeddings
    assert abs(prompt.mean().item()) < 0.1
    assert prompt.std().item() == pytest.approx(1.0, abs=0.05)


def test_the_seed_decides_how_prompts_start(backbone):
    first, same, other = (model_of(backbone, seed=seed).prompt_embeddings for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("spec", MIXED)
def test_gradients_are_the_slope_of_the_loss(folder, spec):
    """A central difference along the gradient itself: it is as steep as the gradient is long."""
    with float64_throughout():
        backbone = LocalBackbone(folder, device="cpu", dtype="float64")
        trial = make_trial(backbone, spec)
        trial.model(trial.batch).backward()
        parameters = list(trial.model.parameters())
        slope = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
        losses, width = [], 1e-2
        for move in (width, -2 * width):  # to one side, then to the other
            with torch.no_grad():
                for p in parameters:
                    p += move / slope * p.grad
                losses.append(trial.model(trial.batch).item())
    assert slope > 1e-2
    assert (losses[0] - losses[1]) / (2 * width) == pytest.approx(slope, rel=2e-3)


def test_backward_scales_and_adds_up_as_in_torch(backbone):
    trial = make_trial(backbone, MIXED[1])
    trial.model(trial.batch).backward()
    once = [p.grad.clone() for p in trial.model.parameters()]
    (3 * trial.model(trial.batch)).backward()
    for p, grad in zip(trial.model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 4 * grad)


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_evaluation_is_exact_however_rows_are_cut(backbone, task):
    """A mean over batches of different sizes would not be the mean over rows (or tokens)."""
    model = model_of(backbone, task)
    data = random_dataset(task, [3, 12, 5, 7, 2, 9, 4], seed=6)
    whole = model.evaluate([data.batch(range(7))])
    cut = model.evaluate([data.batch([0, 1, 2, 3, 4]), data.batch([5]), data.batch([6])])
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.metric == pytest.approx(whole.metric, rel=1e-6)
    if task == "causal-lm":
        assert whole.metric == {"perplexity": pytest.approx(math.exp(whole.loss))}


def test_accuracy_counts_the_rows_that_score_highest_for_their_class(backbone):
    model = model_of(backbone, "classification")
    with torch.no_grad():
        model.score.zero_()  # all classes alike: argmax takes class 0
    data = random_dataset("classification", [4, 5, 6, 7], seed=1)  # classes 0, 1, 2, 0
    evaluation = model.evaluate([data.batch(range(4))])
    assert evaluation.metric == {"accuracy": 0.5, "f1": pytest.approx(2 / 3 / 3)}
    assert evaluation.loss == pytest.approx(math.log(CLASSES))


def test_evaluation_leaves_no_gradient_behind(backbone):
    trial = make_trial(backbone, MIXED[1])
    trial.model.evaluate([trial.batch])
    assert all(p.grad is None for p in trial.model.parameters())


def test_padding_changes_nothing(backbone):
    """Neither its token nor how much of it there is: attention is causal, labels leave it out."""
    for spec in MIXED:
        trial = make_trial(backbone, spec)
        loss = trial.model(trial.batch)
        tokens = trial.batch.tokens_BT.clone()
        for row, length in enumerate(trial.batch.lengths_B.tolist()):
            tokens[row, length:] = VOCAB - 1
        other = trial.model(replace(trial.batch, tokens_BT=tokens))
        torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)


def test_a_half_precision_backbone_trains_float32_prompts(folder):
    """As in Petals: prompts and their gradients stay in float32."""
    backbone = LocalBackbone(folder, device="cpu", dtype="bfloat16")
    for spec in MIXED:
        trial = make_trial(backbone, spec)
        trial.model(trial.batch).backward()
        exact = make_trial(LocalBackbone(folder, device="cpu", dtype="float32"), spec)
        exact.model(exact.batch).backward()
        for ours, theirs in zip(trial.model.parameters(), exact.model.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            assert torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), 0) > 0.98
