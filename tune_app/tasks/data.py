"""Tokenised rows and the order in which training takes them.

Shapes: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tune_app.tasks.base import IGNORED, Task
from tune_app.tasks.start_tokens import StartTokens
from tune_app.tasks.summary import DataSummary


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, on the CPU.

    No attention mask is needed: in a causal model no real token attends to what is right of it.
    """

    tokens_BT: torch.Tensor  # int64
    labels: torch.Tensor  # [B]: class indices or numbers; without labels [B, T], IGNORED on padding
    lengths_B: torch.Tensor  # real tokens of each row


class Dataset:
    """Tokenised rows of different lengths.

    labels: one per row: class indices (int), or numbers (float); None if rows have none
    learned_from: for rows without labels, the first token that counts in the loss; None: all do
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        labels: Sequence[int] | Sequence[float] | None = None,
        pad_id: int = 0,
        learned_from: Sequence[int] | None = None,
    ) -> None:
        self._rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        self._lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self.labels_N = None if labels is None else torch.tensor(labels)  # int64 or float32
        self._pad_id = pad_id
        self._learned_from = None if learned_from is None else torch.tensor(learned_from)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: torch.Tensor | Sequence[int]) -> Batch:
        """The rows at `indices`, padded to the longest of them."""
        indices_B = torch.as_tensor(indices, dtype=torch.int64)
        rows = [self._rows[i] for i in indices_B.tolist()]
        tokens_BT = pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
        if self.labels_N is None:
            labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
            if self._learned_from is not None:
                places_T = torch.arange(labels.shape[1])
                labels[places_T < self._learned_from[indices_B][:, None]] = IGNORED
        else:
            labels = self.labels_N[indices_B]
        return Batch(tokens_BT, labels, self._lengths[indices_B])

    def completion(self, i: int) -> tuple[list[int], list[int]] | None:
        """(prompt, completion) of the row in tokens; None if rows are not divided so."""
        if self._learned_from is None:
            return None
        row, start = self._rows[i].tolist(), int(self._learned_from[i])
        return row[:start], row[start:]

    def fingerprint(self) -> str:
        """sha256 over all token ids, their order and the labels."""
        digest = hashlib.sha256(self._lengths.numpy().tobytes())
        for row in self._rows:
            digest.update(row.numpy().tobytes())
        if self.labels_N is not None:
            digest.update(self.labels_N.numpy().tobytes())
        if self._learned_from is not None:
            digest.update(self._learned_from.numpy().tobytes())
        return digest.hexdigest()


def last_token(hidden_BTH: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B, H]: the hidden state of each row's last real token, which has seen the whole text."""
    rows_B = torch.arange(len(lengths_B), device=hidden_BTH.device)
    return hidden_BTH[rows_B, lengths_B.to(hidden_BTH.device) - 1]


@dataclass(frozen=True)
class TaskData:
    """The data that a search trains, compares and finally tests on: three separate splits."""

    task: Task
    train: Dataset
    valid: Dataset
    judged: Dataset  # the validation rows on which trials are compared while they train
    test: Dataset
    class_names: tuple[str, ...]  # by class index; empty if labels are not classes
    notes: list[str]  # what was assumed, dropped or cut: one sentence each, for the user
    fingerprint: str  # sha256; equal only if every trial would see the same tokens and labels
    summary: DataSummary
    start: StartTokens = field(default_factory=StartTokens)
    # So many of the judged rows, which come first there, are enough where nothing is decided; None:
    # all are always taken.
    glimpse: int | None = None

    @property
    def outputs(self) -> int:
        """Rows of the score head; 0: there is none."""
        return self.task.outputs(self.class_names)


@dataclass(frozen=True)
class DataOrder:
    """Which rows each training step takes: shuffled passes over the data, one after the other.

    A pure function of (seed, step), so a trial that resumes from a checkpoint only needs its step.
    A batch may span two passes, so that no pass leaves out a row.
    """

    size: int  # rows in the data
    batch_size: int
    seed: int

    def indices(self, step: int) -> torch.Tensor:
        """int64 [batch_size]: the rows of training step `step` (the first is 0)."""
        first = step * self.batch_size
        parts = []
        for epoch in range(first // self.size, (first + self.batch_size - 1) // self.size + 1):
            start = max(first - epoch * self.size, 0)
            stop = first + self.batch_size - epoch * self.size
            parts.append(_shuffled(self.size, self.seed, epoch)[start:stop])
        return torch.from_numpy(np.concatenate(parts))


@lru_cache(maxsize=32)  # a few running trials of 100,000 rows each: about 25 MB
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
