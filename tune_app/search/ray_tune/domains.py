"""Ray Tune's domains (`tune.loguniform(1e-4, 1e-1)`) as a search space file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized

from tune_app.run.search_config import ConfigError


def space_of_domains(given: Mapping[str, Any]) -> dict[str, Any]:
    """`parameters` of the domains and `fixed` of the plain values; yaml_space.py has the format.

    Raises ConfigError for what the format does not support: grids, functions, normal distributions.
    """
    parameters: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    messages = []
    for name, value in given.items():
        if not isinstance(value, Domain | Mapping | list | tuple):
            fixed[name] = value
            continue
        spec = _parameter(value)
        if spec is None:
            messages.append(
                f"space: {name}: must be a value, or ray.tune's uniform, loguniform, randint, "
                f"lograndint, choice, quniform or qrandint, got {_shown(value)}."
            )
        else:
            parameters[name] = spec
    if messages:
        raise ConfigError(messages)
    return {"parameters": parameters} | ({"fixed": fixed} if fixed else {})


def _parameter(domain: Any) -> dict[str, Any] | None:
    if isinstance(domain, Categorical):
        return {"space": "choice", "categories": list(domain.categories)}
    if not isinstance(domain, Float | Integer):
        return None
    sampler, step = domain.get_sampler(), {}
    kind = "uniform" if isinstance(domain, Float) else "randint"
    if isinstance(sampler, Quantized):
        kind, step = "q" + kind, {"q": sampler.q}
        sampler = sampler.sampler
    if isinstance(sampler, LogUniform):
        kind = "log" + kind
    elif type(sampler).__name__ not in ("_Uniform", "Uniform"):
        return None
    if kind.startswith("logq"):
        return None
    return {"space": kind, "lower": domain.lower, "upper": domain.upper} | step


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, Mapping | list | tuple) else type(value).__name__
