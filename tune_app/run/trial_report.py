"""When a trial reports, and what it says. Imports neither torch nor ray: trial actors load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_app.run.run_dir import Status

OBJECTIVE = "objective"  # the figure that the study minimises
# Evaluations of a run: enough for early stopping to act on and for a curve.
EVALUATIONS = 5


def evaluation_steps(steps: int) -> list[int]:
    """The steps after which a run of `steps` is evaluated: even intervals, the last one included.

    >>> evaluation_steps(60)
    [12, 24, 36, 48, 60]
    """
    count = min(EVALUATIONS, steps)
    return [round(steps * (i + 1) / count) for i in range(count)]


@dataclass
class Usage:
    """What a trial has had computed so far, evaluations included.

    The last five are sums over the packs that carried its rows and count the whole of each pack.
    """

    rows: int = 0
    tokens: int = 0  # prompts included, padding not
    wait_s: float = 0.0  # in which the trial did nothing but wait for its packs
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
    """The state of a trial after an evaluation."""

    step: int
    train_loss: float  # nats, mean over the steps since the last report
    eval_loss: float  # mean over rows or tokens, as the task measures it
    objective: float  # eval_loss, or a finite penalty where the trial diverged
    learning_rate: float  # that the last step used
    tokens: int  # through the backbone in training so far, prompts included, padding not
    seconds: float  # of training so far, evaluations included
    metric: dict[str, float]  # the task's metrics, by name
    usage: dict[str, Any] = field(default_factory=dict)  # Usage.flat()
    diverged: bool = False

    def flat(self) -> dict[str, Any]:
        """The report as Ray Tune and events.jsonl take it."""
        values = {k: v for k, v in vars(self).items() if k not in ("metric", "usage")}
        return values | self.metric | self.usage


@dataclass(frozen=True)
class Update:
    """What a trial host answers to the trial that asks how its training goes."""

    report: dict[str, Any] | None = None  # None: nothing new yet
    done: bool = False
    error: str | None = None  # the traceback, where the training raised
    unavailable: bool = False  # the error is the swarm's, not the trial's


# What events and the study keep of a result of Ray Tune, which has keys of its own beside them.
_KEPT = [
    "step",
    "train_loss",
    "eval_loss",
    "objective",
    "learning_rate",
    "tokens",
    "seconds",
    "diverged",
    *Usage().flat(),
    "accuracy",
    "perplexity",
    "r2",
    "test_loss",
    "test_accuracy",
    "test_perplexity",
    "test_r2",
]


def kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a result that a trial has reported."""
    return {name: result[name] for name in _KEPT if name in result}


def outcome(last: dict[str, Any], steps: int) -> tuple[Status, str]:
    """How a trial of `steps` steps that ended without an error ended, and the reason in words."""
    if last.get("diverged"):
        return Status.DIVERGED, "the loss exploded or was not finite"
    if last.get("step", 0) >= steps:
        return Status.FINISHED, ""
    return Status.STOPPED, f"behind the others at step {last.get('step', 0)}"
