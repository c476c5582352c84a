"""The frozen model's outputs with tuned prompts.

Shapes: see `backbones/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tune_app.backbones.packer import run_alone
from tune_app.backbones.packing import Sums
from tune_app.tasks.data import Dataset, last_token
from tune_app.train.prompt_model import PromptTunedModel


def row_scores(model: PromptTunedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, C]: the score head's outputs, such as a score for each class, for each row of token ids,
    none of which may be empty."""
    batch = Dataset(rows, [0] * len(rows)).batch(range(len(rows)))  # the labels are not used
    score_CH = model.score
    if score_CH is None:
        raise ValueError("these prompts have no score head, because they complete texts")

    def scores(hidden_BTH: torch.Tensor, part: slice) -> torch.Tensor:
        pooled_BH = last_token(hidden_BTH, batch.lengths_B[part])
        return pooled_BH.to(score_CH.dtype) @ score_CH.T

    return _apply(model, batch, scores)


def class_probabilities(model: PromptTunedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, C], float32: `row_scores` as probabilities of classes."""
    return row_scores(model, rows).float().softmax(-1)


def next_token_logits(model: PromptTunedModel, tokens: Sequence[int]) -> torch.Tensor:
    """[V]: the logits of the next token."""

    def last_logits(hidden_BTH: torch.Tensor, part: slice) -> torch.Tensor:
        return model.backbone.logits(hidden_BTH[:, -1:])[:, 0]

    return _apply(model, Dataset([tokens]).batch([0]), last_logits)[0]


@torch.no_grad()
def _apply(
    model: PromptTunedModel, batch: Any, head: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    """`head` applied to the final hidden states of all rows, in their order."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(hidden_BTH: torch.Tensor, part: slice) -> tuple[torch.Tensor, Sums]:
        outputs[part.start] = head(hidden_BTH, part)
        return hidden_BTH.new_zeros(()), {}

    run_alone(model.backbone, replace(model.request(batch, needs_grad=False), head=keep))
    return torch.cat([outputs[start] for start in sorted(outputs)])
