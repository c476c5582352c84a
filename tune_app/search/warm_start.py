"""What earlier runs say to a new search (`--warm-start`): configs to begin with, and priors.

Only ranks count, because losses of other data or another model do not compare: within a run, its
better half, the best with the largest weight. Learning rates are taken as they are; what is counted
in steps is taken as a share of the run, so that a run of another length has something to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tune_app.report.results import load
from tune_app.run.events import WarmStarted
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.study.prior import fitted, to_json
from tune_app.study.space import SearchSpace

# One in this many trials of a search repeats a config of an earlier run.
_ONE_IN = 8
_RANKED = (Status.FINISHED, Status.STOPPED, Status.DIVERGED)
_IN_STEPS = ("warmup_steps", "num_decay_steps", "timescale")
_WARMUP = frozenset({"warmup_steps", "warmup_ratio"})


@dataclass(frozen=True)
class EarlierRun:
    """A run as far as another search can learn from it.

    ranked: configs, the best first
    searched: the parameters that it varied
    """

    path: Path
    ranked: tuple[TrialConfig, ...]
    searched: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> EarlierRun:
        """Raises ConfigError if there is no run, or if none of its trials has finished."""
        run = RunDir(path)
        if not run.events_jsonl.is_file():
            raise ConfigError(
                f"--warm-start: {str(path)!r} is not a run's folder (no events.jsonl)."
            )
        results = load(run)
        if results.finished.empty:
            raise ConfigError(
                f"--warm-start: no trial of {str(path)!r} has finished, so nothing can be learned "
                "from it."
            )
        rows = results.searched
        numbers = [int(n) for n in rows.loc[rows["status"].isin(_RANKED), "trial"]]
        if results.best is not None:  # what the confirmation has chosen
            best = int(results.best["trial"])
            numbers = [best, *(n for n in numbers if n != best)]
        configs = (TrialConfig.from_known(results.configs[n]) for n in numbers)
        ranked = tuple(config.at(config.steps) for config in configs)  # as a population ended
        return cls(run.path, ranked, frozenset(results.sampled))

    def weighted(self) -> Iterator[tuple[TrialConfig, float]]:
        """The better half and their weights, which add up to 1: those of CMA-ES's recombination
        (Hansen 2016, "The CMA Evolution Strategy: A Tutorial", eq. 49)."""
        half = (len(self.ranked) + 1) // 2
        weights = [math.log(half + 0.5) - math.log(rank) for rank in range(1, half + 1)]
        for config, weight in zip(self.ranked, weights, strict=False):
            yield config, weight / sum(weights)


def check_warm_start(config: SearchConfig, space: SearchSpace) -> list[str]:
    """What is wrong with --warm-start; [] if all is well."""
    if not config.warm_start:
        return []
    messages = []
    own = {RunDir(path).path for path in (config.out, config.resume) if path is not None}
    for path in dict.fromkeys(config.warm_start):
        if RunDir(path).path in own:
            messages.append(f"--warm-start: {str(path)!r} is this run itself; name earlier ones.")
            continue
        try:
            run = EarlierRun.read(path)
        except ConfigError as error:
            messages += error.messages
            continue
        if not any(_common(name, run.searched) for name in space.sampled_names):
            messages.append(
                f"--warm-start: {str(path)!r} has no parameter in common with the space: it varied "
                f"{', '.join(sorted(run.searched)) or 'nothing'}, {space.name} has "
                f"{', '.join(space.sampled_names)}."
            )
    if config.resume is not None and not messages:
        messages.append(
            "--warm-start: is for the beginning of a search; a resumed run keeps what it took over "
            "then. Leave it out, or start a new run with another --out."
        )
    return messages


def take_over(config: SearchConfig, space: SearchSpace) -> WarmStarted:
    """What the search takes over. Raises ConfigError if a run has gone since it was checked."""
    runs = [EarlierRun.read(path) for path in dict.fromkeys(config.warm_start)]
    return learned(runs, space, config.base_trial(), config.trials)


def learned(
    runs: list[EarlierRun], space: SearchSpace, base: TrialConfig, trials: int
) -> WarmStarted:
    """What a search of `trials` trials over the space takes over from the runs."""
    moved = [[_moved(earlier, space, base) for earlier in run.ranked] for run in runs]
    inside = [[config for config in configs if config is not None] for configs in moved]
    # The best of each run, then the second of each: runs count alike.
    in_turn = dict.fromkeys(chain.from_iterable(zip_longest(*inside)))
    first = [c for c in in_turn if c is not None and c not in space.baselines(base)]
    priors = {}
    for parameter in space.parameters:
        values = [
            (value, weight)
            for run in runs
            if _common(parameter.name, run.searched)
            for earlier, weight in run.weighted()
            if (value := _within(parameter.distribution, _value(earlier, parameter.name, base)))
            is not _OUTSIDE
        ]
        if values:
            priors[parameter.name] = to_json(fitted(values, parameter.distribution))
    return WarmStarted(
        trials={str(run.path): len(run.ranked) for run in runs},
        first=tuple(first[: max(1, trials // _ONE_IN)]),
        priors=priors,
    )


_OUTSIDE = object()  # None is a value of some choices


def _common(name: str, searched: frozenset[str]) -> bool:
    return name in searched or (name in _WARMUP and bool(_WARMUP & searched))


def _value(earlier: TrialConfig, name: str, base: TrialConfig) -> Any:
    """The config's value of a field, in a run of the base's length."""
    if name == "warmup_ratio":
        return earlier.num_warmup_steps() / earlier.steps
    value = earlier.num_warmup_steps() if name == "warmup_steps" else getattr(earlier, name)
    if name in _IN_STEPS and value is not None:
        return round(value * base.steps / earlier.steps)
    return value


def _within(distribution: BaseDistribution, value: Any) -> Any:
    """The value as the distribution has it, its next step where it has steps; else _OUTSIDE."""
    if isinstance(distribution, CategoricalDistribution):
        return value if value in distribution.choices else _OUTSIDE
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return _OUTSIDE
    if step is not None:
        value = min(low + round((value - low) / step) * step, high)
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def _moved(earlier: TrialConfig, space: SearchSpace, base: TrialConfig) -> TrialConfig | None:
    """The earlier config as one of this search; None where it lies outside of the space."""
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        if not parameter.active(values):
            continue
        value = _within(parameter.distribution, _value(earlier, parameter.name, base))
        if value is _OUTSIDE:
            return None
        values[parameter.name] = value
    config = space.trial_config(values, base)
    return config if not config.check() and space.params_of(config, base) is not None else None
