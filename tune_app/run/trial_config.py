"""TrialConfig: everything that one trial trains with. Imports neither torch nor ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_type_hints

from tune_app.run.typed import ConfigError, convert, convert_fields, did_you_mean, one_of

TuningMode = Literal["ptune", "deep_ptune"]
# How prompts are initialised: see train/prompt_init.py.
Init = Literal["normal", "vocab", "text", "labels"]
DeepInit = Literal["normal", "zero"]

CurveType = Literal["linear", "cosine", "1-sqrt"]

# The names of transformers' SchedulerType, each with the arguments that its schedule takes besides
# warmup and length (a test compares them with transformers, which is slow to import). Left out are
# greedy, which needs a loss at every step, and arguments that duplicate another one: min_lr (use
# min_lr_rate, which fits every lr) and num_stable_steps (the rest of the run).
SCHEDULER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("power", "lr_end"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": ("factor", "patience"),
    "cosine_with_min_lr": ("num_cycles", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
# Arguments for which transformers has no default.
_REQUIRED = {
    "cosine_with_min_lr": "min_lr_rate",
    "cosine_warmup_with_min_lr": "min_lr_rate",
    "warmup_stable_decay": "num_decay_steps",
}
SCHEDULERS_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
_ARGUMENT_NAMES = (
    *("num_cycles", "power", "lr_end", "timescale", "factor", "patience", "min_lr_rate"),
    *("warmup_lr_rate", "num_decay_steps", "warmup_type", "decay_type", "min_lr_ratio"),
)
# Fields that may change mid-run: changing them affects neither tensor shapes, nor data order, nor
# AdamW's state (amsgrad would, since it keeps another moment).
CHANGEABLE = (
    *("lr", "beta1", "beta2", "eps", "weight_decay"),
    *("scheduler", "warmup_steps", "warmup_ratio", *_ARGUMENT_NAMES, "max_grad_norm"),
)


def parse_changes(value: Any) -> tuple[tuple[int, str, Any], ...]:
    """Changes from a list of [step, name, value], as YAML and JSON hold them.

    Raises ValueError, without the field's name.
    """
    hints, changes = get_type_hints(TrialConfig), []
    for entry in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise ValueError(f"must be a list of [step, name, value], got {entry!r}.")
        step, name, changed = entry
        if name not in CHANGEABLE:
            raise ValueError(
                f"{name!r} cannot change while a trial trains.{did_you_mean(name, CHANGEABLE)}"
            )
        changes.append((convert(step, int), name, convert(changed, hints[name])))
    return tuple(changes)


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space: everything that one trial trains with.

    The defaults are the documented default that every search runs first: AdamW with its own betas
    and eps, no weight decay, lr 1e-3, linear decay after 100 warmup steps (capped to the length of
    the run), and prompts drawn from normal(0, 1), as in Petals and PEFT.
    """

    # AdamW
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    # transformers.get_scheduler; None is transformers' own default
    scheduler: str = "linear"
    warmup_steps: int = 100
    warmup_ratio: float | None = None  # of `steps`; wins over warmup_steps
    num_cycles: float | None = None  # of cosines (0.5 = half a wave; with_restarts: whole)
    power: float | None = None  # polynomial
    lr_end: float | None = None  # polynomial
    timescale: int | None = None  # inverse_sqrt
    factor: float | None = None  # reduce_lr_on_plateau
    patience: int | None = None  # reduce_lr_on_plateau, in evaluations
    min_lr_rate: float | None = None  # cosine*_with_min_lr: where it ends, as a share of lr
    warmup_lr_rate: float | None = None  # cosine_warmup_with_min_lr: where it begins, likewise
    # warmup_stable_decay: length of the decay, at most what the warmup leaves of the run; the
    # shapes of warmup and decay; where it ends, as a share of lr
    num_decay_steps: int | None = None
    warmup_type: CurveType | None = None
    decay_type: CurveType | None = None
    min_lr_ratio: float | None = None
    # the prompts, the batches, the length of the run
    tuning_mode: TuningMode = "ptune"
    prompt_length: int = 8
    init: Init = "normal"
    deep_init: DeepInit = "normal"  # deep_ptune
    batch_size: int = 8
    steps: int = 100
    max_grad_norm: float | None = None  # None: no clipping, as in the reference setup
    seed: int = 0  # data order and prompt initialisation
    # (step, name, value): the field `name` has this value after `step` steps (--scheduler pbt)
    changes: tuple[tuple[int, str, Any], ...] = field(default=(), metadata={"parse": parse_changes})

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], base: TrialConfig | None = None) -> TrialConfig:
        """The config that the mapping describes; missing fields come from `base`.

        Types are converted ("1e-2" is a number). Ranges are not checked: see `check`.

        Raises:
            ConfigError: unknown names (with suggestions) or values of the wrong type.
        """
        values, messages = convert_fields(cls, mapping)
        if messages:
            raise ConfigError(messages)
        return replace(base or cls(), **values)

    @classmethod
    def from_known(cls, mapping: Mapping[str, Any]) -> TrialConfig:
        """The config that a run of another version recorded: unknown names are ignored, missing
        ones get their defaults."""
        values, _ = convert_fields(cls, mapping)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` takes, ready for YAML and JSON; `changes` only if there are
        any."""
        values = dict(vars(self))
        changes = [list(change) for change in values.pop("changes")]
        return values | ({"changes": changes} if changes else {})

    def at(self, step: int) -> TrialConfig:
        """The config, without changes, that holds after `step` steps."""
        changed = {name: value for since, name, value in self.changes if since <= step}
        return replace(self, changes=(), **changed)

    def phases(self) -> dict[int, TrialConfig]:
        """First step -> the config that holds from there to the next key."""
        return {step: self.at(step) for step in sorted({0, *(since for since, *_ in self.changes)})}

    def check(self) -> list[str]:
        """All values that training cannot run with; [] if there are none.

        An argument that the chosen scheduler does not take is refused, because a search over it
        would find noise. Warmup is different: it has a default, so the schedules without warmup
        (constant, reduce_lr_on_plateau) ignore it.
        """
        messages = []

        def rule(name: str, holds: bool, expected: str) -> None:
            if not holds:
                messages.append(f"{name}: must be {expected}, got {getattr(self, name)!r}.")

        rule("lr", self.lr > 0, "above 0")
        rule("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        rule("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        rule("eps", self.eps > 0, "above 0")
        rule("weight_decay", self.weight_decay >= 0, "0 or more")
        rule("warmup_steps", self.warmup_steps >= 0, "0 or more")
        if self.warmup_ratio is not None:
            rule("warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        rule("tuning_mode", self.tuning_mode in ("ptune", "deep_ptune"), "ptune or deep_ptune")
        inits, deep_inits = get_args(Init), get_args(DeepInit)
        rule("init", self.init in inits, f"one of {', '.join(inits)}")
        rule("deep_init", self.deep_init in deep_inits, f"one of {', '.join(deep_inits)}")
        if self.deep_init != "normal" and self.tuning_mode != "deep_ptune":
            messages.append(
                f"deep_init: needs tuning_mode 'deep_ptune', got {self.deep_init!r} with "
                f"{self.tuning_mode!r}."
            )
        for name in ("prompt_length", "batch_size", "steps"):
            rule(name, getattr(self, name) >= 1, "1 or more")
        rule("seed", self.seed >= 0, "0 or more")
        if self.max_grad_norm is not None:
            rule("max_grad_norm", self.max_grad_norm > 0, "above 0")
        return messages + self._check_scheduler() + self._check_changes()

    def _check_changes(self) -> list[str]:
        if not self.changes:
            return []
        outside = [since for since, *_ in self.changes if not 0 < since < self.steps]
        if outside:
            return [f"changes: must be after steps 1 to {self.steps - 1}, got {outside[0]}."]
        return [
            f"changes after step {step}: {message}"
            for step, phase in self.phases().items()
            for message in phase.check()
            if step > 0
        ]

    def _check_scheduler(self) -> list[str]:
        if self.scheduler not in SCHEDULER_ARGUMENTS:
            return [f"scheduler: {one_of(self.scheduler, SCHEDULER_ARGUMENTS)}"]
        messages = []
        for name in _ARGUMENT_NAMES:
            if getattr(self, name) is None or name in SCHEDULER_ARGUMENTS[self.scheduler]:
                continue
            takers = [key for key, names in SCHEDULER_ARGUMENTS.items() if name in names]
            messages.append(
                f"{name}: scheduler {self.scheduler!r} does not take it "
                f"(only {', '.join(takers)}), got {getattr(self, name)!r}."
            )
        required = _REQUIRED.get(self.scheduler)
        if required is not None and getattr(self, required) is None:
            messages.append(
                f"{required}: {self.scheduler} needs it; transformers has no default for it."
            )
        if messages:
            return messages

        def rule(name: str, holds: bool, expected: str) -> None:
            if not holds:
                messages.append(
                    f"{name}: must be {expected} for {self.scheduler}, got {getattr(self, name)!r}."
                )

        if self.num_cycles is not None:
            whole = self.num_cycles.is_integer() and self.num_cycles >= 1
            if self.scheduler == "cosine_with_restarts":
                rule("num_cycles", whole, "a whole number, 1 or more,")
            else:
                rule("num_cycles", self.num_cycles > 0, "above 0")
        if self.power is not None:
            rule("power", self.power > 0, "above 0")
        if self.lr_end is not None:
            # transformers refuses an lr_end that is not below lr
            rule("lr_end", 0 <= self.lr_end < self.lr, f"0 or more and below lr ({self.lr:g})")
        if self.timescale is not None:
            rule("timescale", self.timescale >= 1, "1 or more")
        elif self.scheduler == "inverse_sqrt" and self.num_warmup_steps() == 0:
            messages.append(
                "timescale: inverse_sqrt takes it from the warmup, which is 0 here; "
                "set warmup_steps to 1 or more, or give a timescale."
            )
        if self.factor is not None:
            rule("factor", 0 < self.factor < 1, "between 0 and 1")
        if self.patience is not None:
            rule("patience", self.patience >= 0, "0 or more")
        for name in ("min_lr_rate", "warmup_lr_rate", "min_lr_ratio"):
            if (share := getattr(self, name)) is not None:
                rule(name, 0 <= share <= 1, "in [0, 1]")
        if self.num_decay_steps is not None:
            rule("num_decay_steps", self.num_decay_steps >= 0, "0 or more")
        return messages

    def num_warmup_steps(self) -> int:
        """Warmup in steps, as the scheduler gets it: at most `steps`, 0 for those without one."""
        if self.scheduler in SCHEDULERS_WITHOUT_WARMUP:
            return 0
        if self.warmup_ratio is not None:
            # rounded up, as by transformers.TrainingArguments.get_warmup_steps
            return math.ceil(self.steps * self.warmup_ratio)
        return min(self.warmup_steps, self.steps)
