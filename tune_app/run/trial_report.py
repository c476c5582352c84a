"""When a trial reports, and what. Imports neither torch nor ray, because trial actors load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tune_app.run.run_dir import Status
from tune_app.run.typed import fits, well_typed

OBJECTIVE = "objective"  # name of the metric that the study minimises
# Evaluations per trial: enough for early stopping and for a curve.
EVALUATIONS = 5
# The share of the trials that asha ends at its rung, and how many others it must know for that.
RUNG_ENDS, RUNG_KNOWS = 0.25, 4


def evaluation_steps(steps: int) -> list[int]:
    """The steps after which a run of `steps` is evaluated: even intervals, the last one included.

    >>> evaluation_steps(60)
    [12, 24, 36, 48, 60]
    """
    count = min(EVALUATIONS, steps)
    return [round(steps * (i + 1) / count) for i in range(count)]


def rung_of(steps: int) -> int:
    """The evaluation at which asha compares trials: at three fifths of the run.

    Warmup and large learning rates make a loss worse before it gets better: judged at the first
    evaluations, the best configs are in the worse half (benchmarks/sample_efficiency.py).

    >>> rung_of(60)
    36
    """
    evaluations = evaluation_steps(steps)
    return evaluations[len(evaluations) * 3 // 5 - 1]


def deciding_steps(scheduler: str, steps: int) -> tuple[int, ...]:
    """The evaluations of a trial that something depends on: which trials the search's trial
    scheduler stops or changes, and at the end which is the best. The others are for its curve.

    asha compares trials at its rung alone; median, hyperband and pbt at every evaluation.

    >>> deciding_steps("asha", 60)
    (36, 60)
    """
    if scheduler == "none":
        return (steps,)
    if scheduler == "asha":
        return tuple(sorted({rung_of(steps), steps}))
    return tuple(evaluation_steps(steps))


def rows_of_a_glimpse(rows: int) -> int:
    """Of the rows that trials are compared on, how many an evaluation takes that decides nothing:
    an eighth, 16 at least and 128 at most. With the default settings all evaluations of a trial
    then cost a quarter of its computing at most, even where a training row costs but twice an
    evaluated one."""
    return min(rows, max(16, rows // 8), 128)


@dataclass
class Usage:
    """What the backbone has computed for a trial so far, evaluations included.

    The last five are sums over the packs that contained any of its rows, and count those packs
    whole, other trials' rows included.
    """

    rows: int = 0
    tokens: int = 0  # prompts included, padding not
    wait_s: float = 0.0  # that the trial spent waiting for its packs
    packs: int = 0
    pack_rows: int = 0
    pack_slots: int = 0  # rows that would have fitted
    requests: int = 0  # to the swarm
    retries: int = 0

    def flat(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "packed_tokens": self.tokens,
            "packs": self.packs,
            "occupancy": self.pack_rows / max(1, self.pack_slots),
            "requests": self.requests,
            "retries": self.retries,
            "wait_s": self.wait_s,
        }


@dataclass(frozen=True)
class Report:
    """The state of a trial after an evaluation.

    Every field is a column of history.csv, and so is everything in `metrics`: all readers see all
    of it, and no list of names needs to be kept.

    train_loss: nats, mean over the steps since the last report
    eval_loss: mean over rows or tokens, as the task measures it
    objective: what is minimised (`tasks/objectives.py`); finite even if the trial diverged
    learning_rate: of the last step
    tokens: trained on so far, prompts included, padding not
    seconds: of training so far, evaluations included
    metrics: by name: the counters of `Usage`, the task's metric ("accuracy"), and in the last
        report of a confirmation run the same on the test split ("test_loss", "test_accuracy")
    """

    step: int
    train_loss: float = math.nan
    eval_loss: float = math.nan
    objective: float = math.nan
    learning_rate: float = math.nan
    tokens: int = 0
    seconds: float = 0.0
    diverged: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """The report as Ray Tune, the study and events.jsonl take it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | dict(values.pop("metrics"))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Report:
        """The report that `flat` gave, also by another version: unknown names are metrics, null is
        NaN. What is no number is left out. Raises TypeError if there is no step."""
        if not fits(values.get("step"), int):
            raise TypeError(f"a report has a step, got {values.get('step')!r}")
        own = {f.name for f in fields(cls)}
        known: dict[str, Any] = {}
        metrics: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):  # as checkpoints hold their last report
                metrics |= value
            else:
                (known if name in own else metrics)[name] = math.nan if value is None else value
        known["metrics"] = {k: v for k, v in metrics.items() if fits(v, float | bool)}
        return cls(**well_typed(cls, known))


@dataclass(frozen=True)
class Update:
    """A trial host's answer to a trial that asks for news of its training."""

    report: Report | None = None  # None: nothing new yet
    done: bool = False
    error: str | None = None  # the traceback, if training raised
    unavailable: bool = False  # the swarm failed, not the trial


def outcome(last: Report | None, steps: int) -> tuple[Status, str]:
    """The status of a trial of `steps` steps that ended without an error, and the reason in
    words."""
    if last is not None and last.diverged:
        return Status.DIVERGED, "the loss exploded or was not finite"
    step = 0 if last is None else last.step
    if step >= steps:
        return Status.FINISHED, ""
    return Status.STOPPED, f"behind the others at step {step}"
