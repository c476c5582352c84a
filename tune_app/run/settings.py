"""How a setting is declared: all there is to know about it is next to its field.

Help, checks, resume, best.yaml, the exported prompts and `python -m tune_app.train` follow from the
declaration; a new setting needs no line anywhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Literal, get_args

from tune_app.run.typed import convert, one_of

PriorUse = Literal["on", "off"]

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_TOKENS = {"k": 1e3, "m": 1e6, "b": 1e9}


class Role(Flag):
    """What a setting is for, besides the search itself.

    ONE_CALL: only concerns one call of the command. No YAML file keeps it, so best.yaml and
        search.yaml start a new run in a new folder when they are given to --config
    SAME: a run keeps it, because trials before and after a change could not be compared
    TRIAL: sets the TrialConfig field of the same name, unless the space does
    TRAINING: concerns the training of a single trial, so `python -m tune_app.train` has it too
    PROMPTS: kept with the exported prompts, so that they can be evaluated again
    """

    NONE = 0
    ONE_CALL = auto()
    SAME = auto()
    TRIAL = auto()
    TRAINING = auto()
    PROMPTS = auto()


@dataclass(frozen=True)
class Setting:
    """What is known about a setting besides its name, type and default.

    group: heading under which --help lists it; "": it has no flag, only a key in YAML
    help: its text there, followed by the default
    roles: what else it is for
    at_least: the smallest number allowed
    """

    group: str
    help: str
    roles: Role = Role.NONE
    at_least: int | None = None


def setting(
    default: Any,
    group: str,
    text: str,
    *,
    roles: Role = Role.NONE,
    at_least: int | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is a setting; `parse` reads its value from text."""
    metadata: dict[str, Any] = {"setting": Setting(group, text, roles, at_least)}
    if parse is not None:
        metadata["parse"] = parse
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, Setting]:
    """All settings of a config class by name, in the order declared."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(cls)}


def _scaled(value: Any, units: Mapping[str, float]) -> float:
    if isinstance(value, str) and value[-1:].lower() in units:
        return float(convert(value[:-1], float) * units[value[-1].lower()])
    return float(convert(value, float))


def parse_duration_s(value: Any) -> float:
    """Seconds from 600, "600", "90s", "10m", "2h" or "1d"."""
    try:
        return _scaled(value, _UNITS_S)
    except ValueError:
        raise ValueError(f"must be seconds, or a time such as 10m or 2h; got {value!r}.") from None


def parse_token_count(value: Any) -> int:
    """Tokens from 5000000, "5e6", "5M" or "500k"."""
    try:
        return int(convert(_scaled(value, _UNITS_TOKENS), int))
    except ValueError:
        raise ValueError(f"must be a number of tokens such as 5e6 or 5M; got {value!r}.") from None


def parse_prior_use(value: Any) -> PriorUse:
    """on or off, which YAML reads as booleans unless they are quoted."""
    text: Any = ("on" if value else "off") if isinstance(value, bool) else value
    if text not in get_args(PriorUse):
        raise ValueError(one_of(text, get_args(PriorUse)))
    return text
