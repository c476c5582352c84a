"""Sequence classification: a linear score head on the last real token.

Shapes: B rows, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_app.tasks.base import BuiltIn, Scale, Sums, Task
from tune_app.tasks.objectives import always_the_most_frequent, macro_f1
from tune_app.tasks.stdlib_text import docstring_packages

if TYPE_CHECKING:
    import torch


def loss_sum(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """(summed loss in nats, the numbers of rows and of correct answers, and what `macro_f1` takes).
    Divided by the rows, it is the mean loss of Hugging Face's `...ForSequenceClassification`."""
    from torch.nn.functional import cross_entropy

    pairs = zip(labels_B.tolist(), logits_BC.argmax(dim=-1).tolist(), strict=True)
    sums: Sums = {"targets": len(labels_B), "correct": 0}
    for label, answer in pairs:
        sums["correct"] += label == answer
        names = (f"label {label}", f"answer {answer}") + ((f"hit {label}",) * (label == answer))
        for name in names:
            sums[name] = sums.get(name, 0) + 1
    return cross_entropy(logits_BC.float(), labels_B, reduction="sum"), sums


def accuracy_of_the_most_frequent(train_N: torch.Tensor, labels_B: torch.Tensor) -> float:
    """Accuracy of naming the training rows' most frequent class for every row."""
    return float((labels_B == train_N.mode().values).double().mean())


def _built_in() -> BuiltIn:
    return dict(docstring_packages())


def _answer(logits_BC: torch.Tensor, names: tuple[str, ...], scale: Scale | None) -> list[str]:
    """The most likely class and its probability."""
    most_B, classes_B = logits_BC.float().softmax(-1).max(-1)
    return [
        f"{names[i]}\t{most:.4f}"
        for i, most in zip(classes_B.tolist(), most_B.tolist(), strict=True)
    ]


CLASSIFICATION = Task(
    name="classification",
    labels="classes",
    unit="row",
    loss="nats",
    metric="accuracy",
    higher_is_better=True,
    loss_sum=loss_sum,
    metrics=lambda loss, sums: {
        "accuracy": sums["correct"] / sums["targets"],
        "f1": macro_f1(sums),
    },
    objectives=("loss", "accuracy", "f1"),
    constant=accuracy_of_the_most_frequent,
    frequencies=always_the_most_frequent,
    answer=_answer,
    built_in=_built_in,
    petals_class="AutoDistributedModelForSequenceClassification",
)
