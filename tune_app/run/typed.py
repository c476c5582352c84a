"""From what a person wrote (flags, YAML) to typed values, with all mistakes collected.

Values are converted by a field's type annotation, so flags, YAML keys and Python values follow the
same rules. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from tune_app.run.passwords import without_passwords
from tune_app.run.paths import user_path


class ConfigError(ValueError):
    """Mistakes that the user has to correct, all together; commands print it and exit with code 2.

    Each message says the rule, what was received and what would be right, without the passwords in
    it.
    """

    def __init__(self, messages: str | Iterable[str]) -> None:
        several = [messages] if isinstance(messages, str) else messages
        self.messages: list[str] = [without_passwords(message) for message in several]
        super().__init__(self.messages)  # as the one argument, so that it survives pickling

    def __str__(self) -> str:
        if len(self.messages) == 1:
            return self.messages[0]
        return "\n".join(f"- {message}" for message in self.messages)


_LARGEST = 10**18 - 1  # of whole numbers; pandas, SQLite and torch hold 64 bits


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" with its leading space, or "" if no valid name is similar."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def one_of(value: object, valid: Iterable[str]) -> str:
    """The message for a name that is not among the valid ones."""
    valid = list(valid)
    return f"must be one of {', '.join(valid)}; got {value!r}.{did_you_mean(value, valid)}"


def convert(value: Any, hint: Any) -> Any:
    """The value as the type says: "1e-2" as 0.01 for float, 1e3 as 1000 for int, and so on.

    Raises:
        ValueError: the value does not fit the type; the message lacks the field's name.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # Optional is the only union that fields use
        if value is None:
            return None
        return convert(value, next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        if value not in args:
            raise ValueError(one_of(value, args))
        return value
    if origin is tuple:
        words = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(words, list | tuple):
            raise ValueError(f"must be a list, got {value!r}.")
        return tuple(convert(word, args[0]) for word in words)
    if hint is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a mapping of names to values, got {value!r}.")
        return dict(value)
    return _SCALARS[hint](value)


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}.")
    return value


def _to_float(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}.")
    return number


def _to_int(value: Any) -> int:
    number = _to_any_int(value)
    if abs(number) > _LARGEST:
        raise ValueError(f"must be a whole number of at most 18 digits, got {str(value)[:30]!r}.")
    return number


def _to_any_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value) if isinstance(value, str) else _whole(_to_float(value))
    except ValueError:
        pass
    try:
        return _whole(_to_float(value))  # "1e3"
    except ValueError:
        raise ValueError(f"must be a whole number, got {value!r}.") from None


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON has this type: as it is, nothing is converted."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        items = args[0] if args[1:] == (...,) else Any
        return isinstance(value, tuple) and all(fits(item, items) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, args[0]) and fits(item, args[1]) for key, item in value.items()
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if hint is float:
        return isinstance(value, float) or fits(value, int)
    return isinstance(value, hint)


def well_typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that have the types of the dataclass's fields of their names."""
    hints = _hints(cls)
    return {name: value for name, value in values.items() if fits(value, hints[name])}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _to_str(value: Any) -> str:
    # YAML reads an unquoted `text_column: 0` as a number, which is clear enough, and `no` as false
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text (in quotes, if YAML misreads it), got {value!r}.")
    return str(value)


def _to_path(value: Any) -> Path:
    path = value if isinstance(value, Path) else user_path(_to_str(value))
    try:
        path.exists()
    except (OSError, ValueError) as error:  # too long, say
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot be a path: {reason}, got {str(path)[:100]!r}.") from None
    return path


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: _to_path,
}


def convert_fields(
    cls: type, mapping: Mapping[Any, Any], label: Callable[[str], str] = str
) -> tuple[dict[str, Any], list[str]]:
    """The mapping's values for fields of a dataclass, converted, and what is wrong with the rest.

    A field's metadata may have its own `parse`. Names may be in kebab or snake case. `label` turns
    a field's name into the name that messages use.
    """
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}
    hints = _hints(cls)
    values: dict[str, Any] = {}
    messages = []
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in known:
            messages.append(f"{label(str(key))}: unknown.{did_you_mean(name, known)}")
            continue
        try:
            parse = known[name].metadata.get("parse")
            if parse is not None and value is not None:
                values[name] = parse(value)
            else:
                values[name] = convert(value, hints[name])
        except ValueError as error:
            messages.append(f"{label(name)}: {error}")
    return values, messages


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is a mistake; plain YAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[str, dict[Any, Any]]:
    """The text of a YAML file and the mapping in it.

    Raises:
        ConfigError: the file is missing or unreadable, not YAML (with line and column), or not a
            mapping.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}.") from None
    try:
        content = yaml.load(text, _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{place}: not valid YAML: {problem}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must have `key: value` lines, got {type(content).__name__}.")
    return text, content
