"""What one search and one trial are told: typed, frozen, checked whole before anything starts.

Precedence: the defaults below < `--config FILE` < flags. Below this module no dict of settings is
passed on. Imports neither torch nor ray, because every trial actor loads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Task = Literal["causal-lm", "classification"]
BackboneKind = Literal["swarm", "local"]
TuningMode = Literal["ptune", "deep_ptune"]


class ConfigError(ValueError):
    """What the user has to change, all mistakes together; commands print it and exit with code 2.

    Each message says the rule, what was received and what would be right.
    """

    def __init__(self, messages: str | Iterable[str]) -> None:
        self.messages: list[str] = [messages] if isinstance(messages, str) else list(messages)
        super().__init__(self.messages)  # as the one argument, so that it survives pickling

    def __str__(self) -> str:
        if len(self.messages) == 1:
            return self.messages[0]
        return "\n".join(f"- {message}" for message in self.messages)


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """" Did you mean 'x'?" with a leading space, or "" where nothing valid is similar."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space: all that one trial trains with.

    The defaults are the documented default that every search runs first: AdamW with its own betas
    and eps, no weight decay, lr 1e-3, linear decay after 100 warmup steps (capped to the run).
    """

    # AdamW
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    # transformers.get_scheduler; None leaves an argument at transformers' own default
    scheduler: str = "linear"
    warmup_steps: int = 100
    warmup_ratio: float | None = None  # of `steps`; wins over warmup_steps
    num_cycles: float | None = None  # cosine (0.5 = half a wave), cosine_with_restarts (whole)
    power: float | None = None  # polynomial
    lr_end: float | None = None  # polynomial
    timescale: int | None = None  # inverse_sqrt
    factor: float | None = None  # reduce_lr_on_plateau
    patience: int | None = None  # reduce_lr_on_plateau, in evaluations
    # the prompts, the batches, the length of the run
    tuning_mode: TuningMode = "ptune"
    prompt_length: int = 8
    batch_size: int = 8
    steps: int = 100
    max_grad_norm: float | None = None  # None: no clipping, as in the reference setup
    seed: int = 0  # data order and prompt initialisation


@dataclass(frozen=True)
class SearchConfig:
    """All flags of `python -m tune_app.search`, under the same names."""

    space: str = "default"
    task: Task = "classification"
    train: str | None = None  # None: the built-in text of the task
    valid: str | None = None  # None with `train` given: a tenth of it
    test: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    model: str = "demo"
    backbone: BackboneKind = "swarm"
    peers: tuple[str, ...] = ()  # empty: a private swarm is started
    tuning_mode: TuningMode = "ptune"
    prompt_length: int = 8
    trials: int = 16
    concurrency: int | None = None  # None: from the model, the limits and the machine
    steps: int = 100
    batch_size: int = 8
    max_length: int = 48  # tokens of text in one row, without the prompt
    seed: int = 0
    device: str | None = None  # None: cuda where there is one, else cpu
    dtype: str = "float32"
    address: str | None = None  # an existing Ray cluster
    out: Path | None = None  # None: runs/<date>-<time>
    trial: dict | None = field(default=None)  # best.yaml's config: runs second, after the default
