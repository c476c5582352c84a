"""Search spaces written in Python, for what YAML cannot express: an Optuna define-by-run function.

    def space(trial):                            # in my_space.py, given as --space my_space.py
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        return {"eps": lr * 1e-6}                # constants of this trial, if there are any

Names are fields of TrialConfig. The function must depend on nothing but the trial.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import yaml

from tune_app.run.paths import user_path
from tune_app.run.trial_config import TrialConfig
from tune_app.run.typed import ConfigError, read_yaml
from tune_app.study.parameter import Parameter
from tune_app.study.space import SearchSpace, quiet_optuna

_PROBES = 64  # random points at which a function is tried; rarer parameters go unnoticed


@dataclass(frozen=True)
class PythonFunction:
    """A function by its name, so that it can be pickled wherever it is defined."""

    source: str  # module, or absolute path of a .py file
    function: str

    def __call__(self, trial: optuna.trial.BaseTrial) -> Mapping[str, Any] | None:
        return _resolve(self.source, self.function)(trial)


@functools.cache
def _resolve(source: str, function: str) -> Callable[[Any], Mapping[str, Any] | None]:
    if source.endswith(".py"):
        return runpy.run_path(source)[function]
    return getattr(importlib.import_module(source), function)


def load_python_space(source: str, function: str) -> SearchSpace:
    """The space that `function` in a module or .py file suggests.

    Raises:
        ConfigError: it cannot be loaded, fails, suggests nothing, or suggests what TrialConfig
            refuses.
    """
    if source.endswith(".py"):
        source = str(user_path(source).resolve())
    where = f"{source}:{function}"
    try:
        _resolve(source, function)
        file = source if source.endswith(".py") else importlib.import_module(source).__file__
        digest = hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{where}: cannot be loaded: {error!r}.") from error
    space = SearchSpace(
        name=function,
        parameters=(),
        text=yaml.safe_dump({"python": where, "sha256": digest}, sort_keys=False),
        python=PythonFunction(source, function),
        python_sha256=digest,
    )
    return replace(space, parameters=_probe(space, where))


def code_recorded(path: Path) -> str | None:
    """The code that a run's space.yaml names, if it is there and names any; loads none."""
    if not path.is_file():
        return None
    _, content = read_yaml(path)
    return str(content["python"]) if "python" in content else None


def load_recorded_python_space(path: Path, content: Mapping[str, Any]) -> SearchSpace:
    """The Python space that a run's space.yaml names, with the hash of its code at that time."""
    source, _, function = str(content["python"]).rpartition(":")
    if content.keys() != {"python", "sha256"} or not source:
        raise ConfigError(f"{path}: a Python space must have exactly the keys python and sha256.")
    return replace(load_python_space(source, function), python_sha256=content["sha256"])


def _probe(space: SearchSpace, where: str) -> tuple[Parameter, ...]:
    """What the function suggests at random points, each checked."""
    found: dict[str, Parameter] = {}
    messages: dict[str, None] = {}
    with quiet_optuna():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_PROBES):
            trial = study.ask()
            try:
                constants = space(trial) or {}
                config = space.trial_config({**trial.params, **constants}, TrialConfig())
                messages |= dict.fromkeys(config.check())
            except ConfigError as error:
                messages |= dict.fromkeys(error.messages)
            except Exception as error:  # whatever the user's code raises
                messages[f"failed: {error!r}."] = None
            for name, distribution in trial.distributions.items():
                found.setdefault(name, Parameter(name, "python", distribution))
    if not found:
        messages["suggests no parameter."] = None
    if messages:
        raise ConfigError([f"{where}: {message}" for message in list(messages)[:5]])
    return tuple(found.values())
