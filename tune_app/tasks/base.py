"""What a task is: one record, which everything else asks instead of the task's name.

Light on purpose: reports and trial actors load it, so torch is imported where a loss is computed.

Shapes: B rows, T text tokens (prompt positions already removed), V vocabulary, C outputs of the
score head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross_entropy leaves out, as in Hugging Face's models

# What a row has besides its text.
Labels = Literal["none", "classes", "numbers"]
# What a batch adds up besides its loss, by name; sums add up exactly over batches.
Sums = dict[str, float]
# By split: (texts, labels or None).
BuiltIn = dict[str, tuple[list[str], list[str] | None]]


@dataclass(frozen=True)
class Scale:
    """How the numbers of a regression are standardised: by the training rows' mean and deviation,
    so that learning rates mean the same whatever the labels are measured in."""

    mean: float
    std: float


@dataclass(frozen=True)
class Task:
    """All that a task is.

    name: as in --task
    labels: what a row has besides its text. With "classes" a score head has an output for each
        class, with "numbers" one; with "none" the model's own language head is used.
    unit: what a loss is a mean over: rows, or predicted tokens
    loss: what it is measured in, for people: "nats"
    metric: reported next to the loss, under this name; one of those that `figures` gives
    loss_sum: (outputs, labels) -> (summed loss, sums). Rows with labels: outputs [B, C], labels
        [B]. Without: logits [B, T, V], labels [B, T], where token t + 1 is predicted at t.
    figures: (mean loss, sums of all batches, "targets" among them) -> metrics by name
    objectives: what --objective may name: the loss, and those of the metrics that are fit for it
    constant: (labels of the training rows, labels of a split) -> the metric of always giving the
        one answer that the training rows suggest; None where that means nothing
    answer: (outputs [B, C], class names, scale) -> a line for each row; None: texts are completed
    built_in: the data of a search without --train; None where there are none
    hub_task: what a hub calls such a task ("pipeline_tag")
    petals_class: Petals' own class that the prompts load into; "" where it has none
    """

    name: str
    labels: Labels
    unit: Literal["row", "token"]
    loss: str
    metric: str
    higher_is_better: bool
    loss_sum: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Sums]]
    figures: Callable[[float, Sums], dict[str, float]]
    objectives: tuple[str, ...] = ("loss",)
    constant: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    answer: Callable[[torch.Tensor, tuple[str, ...], Scale | None], list[str]] | None = None
    built_in: Callable[[], BuiltIn] | None = None
    hub_task: str = "text-classification"
    petals_class: str = ""

    def outputs(self, class_names: tuple[str, ...]) -> int:
        """Rows of the score head; 0: there is none."""
        return {"none": 0, "classes": len(class_names), "numbers": 1}[self.labels]

    def targets(self, labels: torch.Tensor) -> int:
        """How many rows or tokens the mean loss of a batch with these labels is a mean over."""
        return len(labels) if self.unit == "row" else int((labels[:, 1:] != IGNORED).sum())
