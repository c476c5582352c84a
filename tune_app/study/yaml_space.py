"""Search space files: YAML (or Python) -> SearchSpace, with all mistakes reported together.

    parameters:                                  # names are fields of TrialConfig
      lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
      scheduler: {space: choice, categories: [linear, cosine, cosine_with_restarts]}
      num_cycles: {space: randint, lower: 1, upper: 5, when: {scheduler: cosine_with_restarts}}
    fixed: {prompt_length: 16}                   # constants, over the flags of the search
    enqueue: [{lr: 3.0e-2, scheduler: cosine}]   # run first, after the documented default

Names and bounds are Ray Tune's: `uniform`, `loguniform` (lower, upper); `quniform` (also q; upper
inclusive); `randint`, `lograndint` (integers, upper EXCLUSIVE); `qrandint` (multiples of q counted
from lower, upper inclusive unless q is 1); `choice` (categories). `when` names values of other
parameters, one or a list, all of which must hold; such a parent may itself have a `when`. For
`init`, `where_possible` lists further categories, for searches that can use them (`labels` needs a
classification's class names, `text` needs --init-text). `prior` says where good values are expected
(prior.py): {center: 1.0e-2, spread: 3} or weights of choices.
"""

from __future__ import annotations

import importlib.resources
import itertools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tune_app.run.own_code import code_named
from tune_app.run.paths import user_path
from tune_app.run.trial_config import SCHEDULER_ARGUMENTS, TrialConfig
from tune_app.run.typed import ConfigError, convert_fields, did_you_mean, one_of, read_yaml
from tune_app.study.parameter import Parameter, contains
from tune_app.study.prior import parse_prior
from tune_app.study.python_space import load_python_space, load_recorded_python_space
from tune_app.study.space import FirstTrial, SearchSpace

__all__ = ["FirstTrial", "Parameter", "SearchSpace", "load_space", "shipped_spaces"]

# Ray's name -> the keys it takes
_KINDS: dict[str, tuple[str, ...]] = {
    "uniform": ("lower", "upper"),
    "quniform": ("lower", "upper", "q"),
    "loguniform": ("lower", "upper"),
    "randint": ("lower", "upper"),
    "qrandint": ("lower", "upper", "q"),
    "lograndint": ("lower", "upper"),
    "choice": ("categories",),
}
_TYPES = typing.get_type_hints(TrialConfig)


def load_space(name_or_path: str) -> SearchSpace:
    """The space of a name in search_spaces/, a YAML file, or `module:function`/`file.py:function`.

    A file.py without `:function` means its function `space`.

    Raises:
        ConfigError: all mistakes in it, each with the file and the key.
    """
    if (code := code_named(name_or_path)) is not None:
        source, _, function = code.rpartition(":")
        return load_python_space(source, function)
    path = user_path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        shipped = shipped_spaces()
        if name_or_path not in shipped:
            raise ConfigError(
                f"--space: must be one of {', '.join(shipped)}, or a .yaml or .py file; "
                f"got {name_or_path!r}.{did_you_mean(name_or_path, shipped)}"
            )
        path = shipped[name_or_path]
    text, content = read_yaml(path)
    if "python" in content:  # a run's copy of a Python space
        return load_recorded_python_space(path, content)
    return _Compiler(str(path)).compile(path.stem, text, content)


def shipped_spaces() -> dict[str, Path]:
    """Name -> file of the spaces that come with tune_app.

    In a wheel they are inside the package (pyproject.toml maps them there), in a checkout next to
    it.
    """
    inside = Path(str(importlib.resources.files("tune_app"))) / "search_spaces"
    folder = inside if inside.is_dir() else inside.parent.parent / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class _Compiler:
    """Compiles one file's content and collects its mistakes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.messages: list[str] = []

    def complain(self, key: str, message: str) -> None:
        self.messages.append(f"{self.file}: {key}: {message}")

    def compile(self, name: str, text: str, content: Mapping[Any, Any]) -> SearchSpace:
        sections = ("parameters", "fixed", "enqueue")
        for key in content:
            if key in _TYPES:
                self.complain(str(key), "must be below `parameters:` or `fixed:`.")
            elif key not in sections:
                self.complain(str(key), f"unknown.{did_you_mean(key, sections)}")
        specs = self._section(content, "parameters", dict)
        fixed = self._values(self._section(content, "fixed", dict), "fixed")
        entries = self._section(content, "enqueue", list)
        enqueue = tuple(
            self._values(entry, f"enqueue[{i}]") if isinstance(entry, dict) else {}
            for i, entry in enumerate(entries)
        )
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.complain(
                    f"enqueue[{i}]", f"must be a mapping of names to values, got {entry!r}."
                )
        parameters = {
            p.name: p for key, spec in specs.items() if (p := self._parameter(str(key), spec))
        }
        if not specs:
            self.complain("parameters", "must name at least one parameter.")
        for both in sorted(parameters.keys() & fixed.keys()):
            self.complain(f"fixed.{both}", "is also a parameter; keep one of them.")
        if {"warmup_steps", "warmup_ratio"} <= parameters.keys() | fixed.keys():
            self.complain(
                "warmup_steps", "warmup_ratio takes precedence over it; keep one of them."
            )
        self._check_conditions(parameters)
        ordered = self._parents_first(parameters)
        space = SearchSpace(name, ordered, fixed, enqueue, text)
        if not self.messages:
            self._check_values(space)
        if self.messages:
            raise ConfigError(self.messages)
        return space

    def _section(self, content: Mapping[Any, Any], key: str, kind: type) -> Any:
        value = content.get(key)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            what = "a mapping" if kind is dict else "a list"
            self.complain(key, f"must be {what}, got {value!r}.")
            return kind()
        return value

    def _values(self, mapping: Mapping[Any, Any], key: str) -> dict[str, Any]:
        values, mistakes = convert_fields(TrialConfig, mapping, label=lambda name: f"{key}.{name}")
        self.messages += [f"{self.file}: {mistake}" for mistake in mistakes]
        scheduler = values.get("scheduler", "linear")
        if str(scheduler) not in SCHEDULER_ARGUMENTS:  # now, along with the other misspellings
            self.complain(f"{key}.scheduler", one_of(scheduler, SCHEDULER_ARGUMENTS))
        return values

    def _parameter(self, written: str, spec: Any) -> Parameter | None:
        """The parameter; None if something is wrong with it."""
        name, where = written.replace("-", "_"), f"parameters.{written}"
        if name not in _TYPES:
            self.complain(where, f"unknown.{did_you_mean(name, _TYPES)}")
        if not isinstance(spec, dict) or "space" not in spec:
            self.complain(where, f"must be {{space: KIND, ...}}, got {spec!r}.")
            return None
        kind = str(spec["space"])
        if kind not in _KINDS:
            self.complain(f"{where}.space", one_of(kind, _KINDS))
            return None
        keys = ("space", *_KINDS[kind], "when", "prior")
        if name == "init":
            keys += ("where_possible",)
        for extra in [k for k in spec if k not in keys]:
            self.complain(
                f"{where}.{extra}", f"{kind} does not take it.{did_you_mean(extra, keys)}"
            )
        missing = [k for k in _KINDS[kind] if k not in spec]
        for key in missing:
            self.complain(f"{where}.{key}", f"missing; {kind} needs it.")
        when = self._when(spec.get("when"), where)
        if missing or name not in _TYPES:
            return None
        distribution = self._distribution(name, kind, spec, where)
        optional: tuple[Any, ...] = ()
        if isinstance(distribution, CategoricalDistribution) and "where_possible" in spec:
            added = self._choice(name, spec["where_possible"], where, "where_possible")
            optional = () if added is None else added.choices
            distribution = self._choice(name, [*distribution.choices, *optional], where)
        if distribution is None:
            return None
        prior = None
        if "prior" in spec:
            prior, mistakes = parse_prior(spec["prior"], distribution)
            for mistake in mistakes:
                self.complain(f"{where}.prior", mistake)
        return Parameter(name, kind, distribution, when, prior, optional)

    def _when(self, when: Any, where: str) -> dict[str, tuple[Any, ...]]:
        if when is None:
            return {}
        if not isinstance(when, dict) or not when:
            self.complain(f"{where}.when", f"must be {{parameter: value or list}}, got {when!r}.")
            return {}
        conditions: dict[str, tuple[Any, ...]] = {}
        for parent, values in when.items():
            listed = values if isinstance(values, list) else [values]
            converted = [self._values({parent: value}, f"{where}.when") for value in listed]
            conditions[str(parent).replace("-", "_")] = tuple(
                value for single in converted for value in single.values()
            )
        return conditions

    def _distribution(
        self, name: str, kind: str, spec: Mapping[str, Any], where: str
    ) -> BaseDistribution | None:
        if kind == "choice":
            return self._choice(name, spec["categories"], where)
        count = len(self.messages)
        whole = kind in ("randint", "qrandint", "lograndint")
        types = typing.get_args(_TYPES[name]) or (_TYPES[name],)
        if not (float in types or (int in types and whole)):
            better = "randint" if int in types else "choice"
            self.complain(f"{where}.space", f"{name} does not take {kind}; use {better}.")
        numbers: dict[str, Any] = {}
        for key in _KINDS[kind]:
            value, mistakes = convert_fields(_Whole if whole else _Real, {key: spec[key]})
            self.messages += [f"{self.file}: {where}.{mistake}" for mistake in mistakes]
            numbers |= value
        if len(self.messages) > count:
            return None
        low, high, q = numbers["lower"], numbers["upper"], numbers.get("q")
        exclusive = whole and (q is None or q == 1)  # as in Ray
        if low >= high:
            self.complain(where, f"lower must be below upper, got {low:g} and {high:g}.")
        if kind.startswith("log") and low <= 0:
            self.complain(f"{where}.lower", f"must be above 0 for {kind}, got {low:g}.")
        if q is not None and q <= 0:
            self.complain(f"{where}.q", f"must be above 0, got {q:g}.")
        elif q is not None and abs((high - low) / q - round((high - low) / q)) > 1e-8:
            self.complain(f"{where}.q", f"upper - lower must be a multiple of it, got {q:g}.")
        if len(self.messages) > count:
            return None
        log = kind.startswith("log")
        if whole:
            return IntDistribution(low, high - exclusive, log=log, step=q or 1)
        return FloatDistribution(low, high, log=log, step=q)

    def _choice(
        self, name: str, categories: Any, where: str, key: str = "categories"
    ) -> CategoricalDistribution | None:
        if not isinstance(categories, list) or not categories:
            self.complain(f"{where}.{key}", f"must be a list of values, got {categories!r}.")
            return None
        choices = [
            value
            for category in categories
            for value in self._values({name: category}, where).values()
        ]
        if len(choices) < len(categories):
            return None
        if len(set(choices)) < len(choices):
            self.complain(f"{where}.{key}", f"must differ from each other, got {choices!r}.")
            return None
        return CategoricalDistribution(choices)

    def _check_conditions(self, parameters: Mapping[str, Parameter]) -> None:
        for parameter in parameters.values():
            for parent, allowed in parameter.when.items():
                where = f"parameters.{parameter.name}.when.{parent}"
                if parent not in parameters:
                    # with a mistake in that parameter, it may just not have been compiled
                    if not any(f"parameters.{parent}" in message for message in self.messages):
                        self.complain(
                            where,
                            f"not a parameter of this space.{did_you_mean(parent, parameters)}",
                        )
                    continue
                for value in allowed:
                    if not contains(parameters[parent].distribution, value):
                        self.complain(
                            where, f"{value!r} is never suggested ({parameters[parent].range()})."
                        )

    def _parents_first(self, parameters: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
        ordered: dict[str, Parameter] = {}

        def place(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                circle = " needs ".join([*path[path.index(name) :], name])
                self.complain(f"parameters.{name}.when", f"is circular: {circle}.")
            elif name in parameters and name not in ordered:
                for parent in parameters[name].when:
                    place(parent, (*path, name))
                ordered[name] = parameters[name]

        for name in parameters:
            place(name, ())
        return tuple(ordered.values())

    def _check_values(self, space: SearchSpace) -> None:
        """Bounds and choices that TrialConfig refuses, alone or in pairs."""
        base = TrialConfig()
        for i, entry in enumerate(space.enqueue):
            for message in space.trial_config(entry, base).check():
                self.complain(f"enqueue[{i}]", message)
        corners = [(p.name, value) for p in space.parameters for value in _corners(p.distribution)]
        pairs = itertools.combinations(corners, 2)
        wanted = [dict([corner]) for corner in corners] + [dict(pair) for pair in pairs]
        refused: dict[str, str] = {}  # parameter -> the first message; the others are like it
        for values in wanted:
            for name, message in _refused(space, base, values):
                refused.setdefault(name, message)
        for name, message in refused.items():
            if "does not take it" in message:
                message += " Restrict it with `when: {scheduler: ...}`."
            self.complain(f"parameters.{name}", message)


@dataclass(frozen=True)
class _Whole:
    lower: int
    upper: int
    q: int


@dataclass(frozen=True)
class _Real:
    lower: float
    upper: float
    q: float


def _corners(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def _refused(
    space: SearchSpace, base: TrialConfig, wanted: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """(parameter, TrialConfig's message) at a point that has the wanted values and meets all
    conditions."""
    targets = dict(wanted)
    for parameter in reversed(space.parameters):  # children before their parents
        if parameter.name in targets:
            for parent, allowed in parameter.when.items():
                targets.setdefault(parent, allowed[0])
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if parameter.active(values):
            first = _corners(parameter.distribution)[0]
            values[parameter.name] = targets.get(parameter.name, first)
    for message in space.trial_config(values, base).check():
        name, _, rest = message.partition(": ")
        yield (name, rest) if name in values else (next(iter(wanted)), message)
