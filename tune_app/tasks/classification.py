"""Sequence classification: a linear score head on the last real token.

Shapes: B rows, T text tokens (prompt positions already removed), H hidden size, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def last_token(hidden_BTH: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B, H]: the hidden state of each row's last real token, which has seen the whole text."""
    rows_B = torch.arange(len(lengths_B), device=hidden_BTH.device)
    return hidden_BTH[rows_B, lengths_B.to(hidden_BTH.device) - 1]


def loss_sum(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(summed loss in nats, number of rows): sums add up exactly over batches."""
    return F.cross_entropy(logits_BC.float(), labels_B, reduction="sum"), len(labels_B)


def loss(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats per row, equal to Hugging Face's `...ForSequenceClassification`."""
    return F.cross_entropy(logits_BC.float(), labels_B)


def correct(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> int:
    """How many rows score highest for their own class; over the number of rows: accuracy."""
    return int((logits_BC.argmax(dim=-1) == labels_B).sum())
