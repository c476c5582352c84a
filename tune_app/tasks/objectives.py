"""What a search optimises, and in which direction: the one place that knows it.

Whatever the objective is, samplers, trial schedulers and confirmation minimise its *cost*. So a
higher accuracy is a lower cost, and no one else has to ask which way is up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# The largest loss whose perplexity still fits a float with room for sums.
_MOST_NATS = 700.0
# Gains smaller than this are not worth having: a share of the value, or points of a share.
_WORTH = 0.01


@dataclass(frozen=True)
class Objective:
    """One thing to optimise.

    name: as in --objective; also the name of its column, but for the loss
    higher_is_better: such values lie in [0, 1], and cost 1 - value
    figure: its value from the sums over rows that an evaluation adds up: "loss" (summed nats) and
        "targets", and what else the task counts
    """

    name: str
    higher_is_better: bool
    figure: Callable[[Mapping[str, float]], float]

    @property
    def column(self) -> str:
        """Where reports have it, on the validation split."""
        return "eval_loss" if self.name == "loss" else self.name

    @property
    def test_column(self) -> str:
        return f"test_{self.name}"

    def cost(self, value: float) -> float:
        """What is minimised; always finite for a finite loss."""
        return 1 - value if self.higher_is_better else min(value, math.exp(_MOST_NATS))

    def of(self, loss: float, metrics: Mapping[str, float]) -> float:
        """The objective's value among the figures of an evaluation."""
        return loss if self.name == "loss" else metrics[self.name]

    def penalty(self, loss: float) -> float:
        """The cost of a trial that diverged, given a loss that no run that still trains exceeds.

        Finite, so that a sampler learns from it, and no better than any run that trains.
        """
        if self.higher_is_better:
            return 1.0  # always wrong
        return math.exp(min(loss, _MOST_NATS)) if self.name == "perplexity" else loss

    def margin(self, baseline: float) -> float:
        """The smallest difference from a baseline of this value that is worth having."""
        return _WORTH if self.higher_is_better else _WORTH * abs(baseline)


def _mean_loss(sums: Mapping[str, float]) -> float:
    return sums["loss"] / sums["targets"]


def _perplexity(sums: Mapping[str, float]) -> float:
    return math.exp(min(_mean_loss(sums), _MOST_NATS))


def macro_f1(sums: Mapping[str, float]) -> float:
    """The mean over the classes of F1 = 2 TP / (2 TP + FP + FN), as scikit-learn's `f1_score` with
    average="macro": over the classes that occur, in the rows or among the answers.

    sums: for class c the rows that are c ("label c"), are called c ("answer c"), and both ("hit c")
    """
    classes = {key.partition(" ")[2] for key in sums if key.startswith(("label ", "answer "))}
    scores = []
    for name in classes:
        rows = sums.get(f"label {name}", 0.0) + sums.get(f"answer {name}", 0.0)
        if rows > 0:
            scores.append(2 * sums.get(f"hit {name}", 0.0) / rows)
    return sum(scores) / len(scores) if scores else math.nan


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("loss", False, _mean_loss),
        Objective("perplexity", False, _perplexity),
        Objective("accuracy", True, lambda sums: sums["correct"] / sums["targets"]),
        Objective("f1", True, macro_f1),
    )
}
LOSS = OBJECTIVES["loss"]


def always_the_most_frequent(train: Sequence[int], split: Sequence[int]) -> dict[str, float]:
    """What it costs on a split to know how frequent the classes are in training, and nothing of the
    texts: accuracy and macro F1 of naming the most frequent one, the loss of answering the shares.

    train, split: rows of each class, by class index
    """
    rows, named = sum(split), max(range(len(train)), key=train.__getitem__)
    # A class without a training row counts as half a row, or the loss would be infinite.
    loss = -sum(
        count * math.log(max(known, 0.5) / sum(train))
        for known, count in zip(train, split, strict=True)
    )
    classes = sum(count > 0 or i == named for i, count in enumerate(split))
    hits = split[named]
    return {
        "loss": loss / rows,
        "accuracy": hits / rows,
        "f1": 2 * hits / (hits + rows) / classes,
    }
