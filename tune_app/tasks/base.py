"""What a task is: one record, which the rest of the code uses instead of the task's name.

Light on purpose, because reports and trial actors load it: torch is only imported where a loss is
computed.

Shapes: B rows, T text tokens (prompt positions already removed), V vocabulary, C outputs of the
score head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross_entropy ignores, as in Hugging Face's models

# What a row has besides its text.
Labels = Literal["none", "classes", "numbers"]
# Sums over the rows of a batch, by name, besides the loss; they add up exactly over batches.
Sums = dict[str, float]
# By split: (texts, labels or None).
BuiltIn = dict[str, tuple[list[str], list[str] | None]]


@dataclass(frozen=True)
class Scale:
    """How the labels of a regression are standardised: by the training rows' mean and standard
    deviation, so that learning rates do not depend on the labels' unit."""

    mean: float
    std: float


@dataclass(frozen=True)
class Task:
    """Everything that defines a task.

    name: as in --task
    labels: what a row has besides its text. With "classes" a score head has an output for each
        class, with "numbers" one; with "none" the model's own language head is used.
    unit: what a loss is a mean over: rows, or predicted tokens
    loss: the unit of the loss, for people: "nats"
    metric: reported next to the loss, under this name; one of those that `metrics` returns
    loss_sum: (outputs, labels) -> (summed loss, sums). Rows with labels: outputs [B, C], labels
        [B]. Without: logits [B, T, V], labels [B, T], where position t predicts token t + 1.
    metrics: (mean loss, sums of all batches, including "targets") -> metrics by name
    objectives: possible values of --objective: the loss, and the metrics that are fit for it
    constant: (labels of the training rows, labels of a split) -> the metric of always giving the
        one answer that the training rows suggest; None if that makes no sense
    frequencies: (rows of each class in training, the same in a split) -> loss and metrics on the
        split of knowing only how frequent the classes are; None if that makes no sense
    answer: (outputs [B, C], class names, scale) -> a line for each row; None: texts are completed
    built_in: the data of a search without --train; None if there are none
    hub_task: the hub's name for such a task ("pipeline_tag")
    petals_class: Petals' own class that can load the prompts; "" if there is none
    """

    name: str
    labels: Labels
    unit: Literal["row", "token"]
    loss: str
    metric: str
    higher_is_better: bool
    loss_sum: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, Sums]]
    metrics: Callable[[float, Sums], dict[str, float]]
    objectives: tuple[str, ...] = ("loss",)
    constant: Callable[[torch.Tensor, torch.Tensor], float] | None = None
    frequencies: Callable[[Sequence[int], Sequence[int]], dict[str, float]] | None = None
    answer: Callable[[torch.Tensor, tuple[str, ...], Scale | None], list[str]] | None = None
    built_in: Callable[[], BuiltIn] | None = None
    hub_task: str = "text-classification"
    petals_class: str = ""

    def outputs(self, class_names: tuple[str, ...]) -> int:
        """Rows of the score head; 0: there is none."""
        return {"none": 0, "classes": len(class_names), "numbers": 1}[self.labels]

    def targets(self, labels: torch.Tensor) -> int:
        """The number of rows or predicted tokens that the mean loss of a batch is a mean over."""
        return len(labels) if self.unit == "row" else int((labels[:, 1:] != IGNORED).sum())
