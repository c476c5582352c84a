"""What a search optimises, and in which direction. No other module needs to know the direction.

Whatever the objective is, samplers, trial schedulers and confirmation minimise its *cost*: a higher
accuracy is a lower cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# The largest loss whose perplexity still fits into a float, with room for sums.
_MOST_NATS = 700.0
# Gains smaller than this do not count: relative for losses, absolute for accuracy and F1.
_WORTH = 0.01


@dataclass(frozen=True)
class Objective:
    """One thing to optimise.

    name: as in --objective; also the name of its column, except for the loss
    higher_is_better: such values are in [0, 1], and their cost is 1 - value
    value: from an evaluation's sums over rows: "loss" (summed nats), "targets", and whatever else
        the task counts
    """

    name: str
    higher_is_better: bool
    value: Callable[[Mapping[str, float]], float]

    @property
    def column(self) -> str:
        """Its name in reports, on the validation split."""
        return "eval_loss" if self.name == "loss" else self.name

    @property
    def test_column(self) -> str:
        return f"test_{self.name}"

    def cost(self, value: float) -> float:
        """What is minimised; always finite for a finite loss."""
        return 1 - value if self.higher_is_better else min(value, math.exp(_MOST_NATS))

    def of(self, loss: float, metrics: Mapping[str, float]) -> float:
        """The objective's value, given an evaluation's loss and metrics."""
        return loss if self.name == "loss" else metrics[self.name]

    def penalty(self, loss: float) -> float:
        """The cost of a trial that diverged, given a loss above that of any run that still trains.

        Finite, so that a sampler learns from it, and no better than any run that trains.
        """
        if self.higher_is_better:
            return 1.0  # always wrong
        return math.exp(min(loss, _MOST_NATS)) if self.name == "perplexity" else loss

    def margin(self, baseline: float) -> float:
        """The smallest difference from a baseline of this value that counts as a gain."""
        return _WORTH if self.higher_is_better else _WORTH * abs(baseline)


def _mean_loss(sums: Mapping[str, float]) -> float:
    return sums["loss"] / sums["targets"]


def _perplexity(sums: Mapping[str, float]) -> float:
    return math.exp(min(_mean_loss(sums), _MOST_NATS))


def macro_f1(sums: Mapping[str, float]) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), as in scikit-learn's `f1_score` with
    average="macro": over the classes that occur among the labels or the answers.

    sums: for class c, the rows labelled c ("label c"), answered c ("answer c"), and both ("hit c")
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
    """Metrics on a split of knowing only the class frequencies in training: accuracy and macro F1
    of always naming the most frequent class, and the loss of predicting the frequencies.

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
