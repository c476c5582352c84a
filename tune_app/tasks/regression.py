"""Regression: a number for each text, from a linear score head on the last real token.

Labels are standardised with the training rows' mean and standard deviation. So always answering the
mean has a loss of 1, and learning rates do not depend on the labels' unit.

Shapes: B rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tune_app.tasks.base import Scale, Sums, Task

if TYPE_CHECKING:
    import torch


def loss_sum(outputs_B1: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """(summed squared error, the number of rows and the sums that give the labels' variance).
    Divided by the rows, it is the mean loss of Hugging Face's `...ForSequenceClassification` with
    one label."""
    errors_B = outputs_B1.squeeze(-1).float() - labels_B
    exact_B = labels_B.double()
    sums: Sums = {
        "targets": len(labels_B),
        "labels": float(exact_B.sum()),
        "squares": float(exact_B.square().sum()),
    }
    return errors_B.square().sum(), sums


def r2(loss: float, sums: Sums) -> float:
    """The coefficient of determination: 1 is perfect, 0 is as good as the rows' own mean, and less
    is worse. NaN if all labels are equal."""
    variance = sums["squares"] / sums["targets"] - (sums["labels"] / sums["targets"]) ** 2
    return 1 - loss / variance if variance > 1e-12 else math.nan


def always_the_mean(train_N: torch.Tensor, labels_B: torch.Tensor) -> float:
    """R² of always answering the training rows' mean: 0, or slightly less."""
    error, sums = loss_sum(train_N.mean().expand(len(labels_B), 1), labels_B)
    return r2(float(error) / len(labels_B), sums)


def _answer(outputs_B1: torch.Tensor, names: tuple[str, ...], scale: Scale | None) -> list[str]:
    """The number, in the labels' original unit."""
    mean, std = (0.0, 1.0) if scale is None else (scale.mean, scale.std)
    return [f"{mean + std * value:.6g}" for value in outputs_B1.squeeze(-1).tolist()]


REGRESSION = Task(
    name="regression",
    labels="numbers",
    unit="row",
    loss="squared standard deviations of the labels",
    metric="r2",
    higher_is_better=True,
    loss_sum=loss_sum,
    metrics=lambda loss, sums: {"r2": r2(loss, sums)},
    constant=always_the_mean,
    answer=_answer,
    petals_class="AutoDistributedModelForSequenceClassification",
)
