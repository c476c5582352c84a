"""Small trials for the tests of the core: models with batches of their own, alone or in a pack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from tune_app.backbones.packer import run_alone
from tune_app.backbones.packing import Answer, Request
from tune_app.backbones.protocol import Backbone
from tune_app.run.trial_config import TrialConfig
from tune_app.tasks.data import Batch, Dataset
from tune_app.tasks.known import TASKS
from tune_app.train.prompt_model import PromptTunedModel

# Models of this size gain nothing by a second thread, and much time is lost between two.
torch.set_num_threads(1)

CLASSES = 3
NAMES = ("a", "b", "c")
VOCAB = 64  # of the tiny models in tests of the core


def random_rows(lengths: list[int], seed: int) -> list[list[int]]:
    """Rows of these lengths over the ids 3 to VOCAB - 1 (what is below has a meaning)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def random_dataset(task: str, lengths: list[int], seed: int) -> Dataset:
    rows = range(len(lengths))
    labels = {"classes": [i % CLASSES for i in rows], "numbers": [i % 5 - 1.5 for i in rows]}
    return Dataset(random_rows(lengths, seed), labels.get(TASKS[task].labels))


@dataclass(frozen=True)
class Spec:
    """What a trial of a test looks like."""

    task: str
    tuning_mode: str
    prompt_length: int
    lengths: tuple[int, ...]  # of the rows of its batch
    seed: int = 0


@dataclass
class Trial:
    model: PromptTunedModel
    batch: Batch

    def request(self, *, needs_grad: bool = True) -> Request:
        return self.model.request(self.batch, needs_grad=needs_grad)


def make_trial(backbone: Backbone, spec: Spec, run=None) -> Trial:
    """The trial with its parameters in the backbone's dtype where that is float64."""
    config = TrialConfig(
        tuning_mode=spec.tuning_mode, prompt_length=spec.prompt_length, seed=spec.seed
    )
    run = run or partial(run_alone, backbone)
    task = TASKS[spec.task]
    model = PromptTunedModel(backbone, run, task, task.outputs(NAMES), config)
    if backbone.dtype == torch.float64:
        model.double()
    batch = random_dataset(spec.task, list(spec.lengths), spec.seed).batch(range(len(spec.lengths)))
    return Trial(model, batch)


# Everything that may differ between the trials of one pack, does.
MIXED = (
    Spec("causal-lm", "ptune", 3, (9, 4, 6), seed=1),
    Spec("classification", "deep_ptune", 5, (7, 12), seed=2),
    Spec("causal-lm", "deep_ptune", 2, (5, 11, 2, 8), seed=3),
    Spec("classification", "ptune", 1, (3,), seed=4),
)


def tensors(answer: Answer) -> list[torch.Tensor]:
    """All gradients of an answer."""
    deep = [] if answer.deep_LPH is None else [answer.deep_LPH]
    return [answer.prompt_PH, *deep, *answer.head_parameters]


def same_bits(a: Answer, b: Answer) -> bool:
    """Whether two answers agree in every bit of loss and gradients."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.loss == b.loss and a.sums == b.sums and all(torch.equal(x, y) for x, y in pairs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """transformers' attention and all losses fall back to float32, whatever the model's dtype."""
    softmax, to_float32, dtype = F.softmax, torch.Tensor.float, torch.get_default_dtype()
    F.softmax = lambda scores, dim, dtype=None: softmax(scores, dim=dim)
    torch.Tensor.float = lambda tensor: tensor
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        F.softmax, torch.Tensor.float = softmax, to_float32
        torch.set_default_dtype(dtype)
