"""Causal language modelling: the loss over next tokens, and perplexity.

Shapes: B rows, T text tokens (prompt positions already removed), V vocabulary. As in Petals' and
Hugging Face's prompt tuning, the first text token is not predicted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tune_app.tasks.base import IGNORED, BuiltIn, Sums, Task
from tune_app.tasks.stdlib_text import language_reference_splits

if TYPE_CHECKING:
    import torch


def loss_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """(summed loss in nats, number of predicted tokens). Divided by that number, it is the mean
    loss of Hugging Face's `...ForCausalLM`."""
    from torch.nn.functional import cross_entropy

    labels_N = labels_BT[:, 1:].reshape(-1)
    logits_NV = logits_BTV[:, :-1].reshape(len(labels_N), -1).float()
    nll = cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    return nll, {"targets": int((labels_N != IGNORED).sum())}


def perplexity(loss: float) -> float:
    """exp of the mean loss; infinite if that overflows a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _built_in() -> BuiltIn:
    return {split: (texts, None) for split, texts in language_reference_splits().items()}


CAUSAL_LM = Task(
    name="causal-lm",
    labels="none",
    unit="token",
    loss="nats",
    metric="perplexity",
    higher_is_better=False,
    loss_sum=loss_sum,
    metrics=lambda loss, sums: {"perplexity": perplexity(loss)},
    objectives=("loss", "perplexity"),
    built_in=_built_in,
    hub_task="text-generation",
    petals_class="AutoDistributedModelForCausalLM",
)
