"""Causal language modelling: the loss over next tokens, and perplexity.

Shapes: B rows, T text tokens (prompt positions already removed), V vocabulary. As in Petals' and
Hugging Face's prompt tuning, the first text token is predicted by nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tune_app.tasks.data import IGNORED


def loss_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(summed loss in nats, number of predicted tokens): sums add up exactly over batches."""
    labels_N = labels_BT[:, 1:].reshape(-1)
    logits_NV = logits_BTV[:, :-1].reshape(len(labels_N), -1).float()
    nll = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    return nll, int((labels_N != IGNORED).sum())


def loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per predicted token, equal to Hugging Face's `...ForCausalLM`."""
    nll, tokens = loss_sum(logits_BTV, labels_BT)
    return nll / tokens


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp of the mean loss; infinite where a float cannot hold it."""
    try:
        return math.exp(nll_sum / tokens)
    except OverflowError:
        return math.inf
