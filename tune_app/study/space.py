"""SearchSpace: what Optuna may suggest, as a define-by-run callable that pickles.

Made by `yaml_space.load_space`; imports neither torch nor ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
)

from tune_app.run.search_config import ConfigError
from tune_app.run.trial_config import TrialConfig
from tune_app.study.parameter import DrawnTrial, Parameter, contains

if TYPE_CHECKING:
    from tune_app.study.prior import Prior

# Fields that concern how a trial is run, not its optimizer and schedule. A space's `fixed` values
# for them apply to the documented default too, so that the comparison is fair.
RUN_FIELDS = ("tuning_mode", "prompt_length", "batch_size", "steps", "seed")


@dataclass(frozen=True)
class FirstTrial:
    """A trial that runs before anything is suggested.

    `params` is its point in the space, or None where the space does not contain it.
    """

    origin: str  # "default", "enqueued" or "warm_start"
    config: TrialConfig
    params: dict[str, Any] | None

    def enqueue(self, study: optuna.Study) -> None:
        """Makes the study ask for this trial next (after those enqueued earlier)."""
        study.enqueue_trial(
            self.params or {},
            user_attrs={
                "origin": self.origin,
                "config": self.config.to_dict(),
                "in_space": self.params is not None,
            },
        )


def origin_of(user_attrs: Mapping[str, Any]) -> str:
    """Where a trial's config comes from; suggested trials have no such attribute."""
    return str(user_attrs.get("origin", "suggested"))


@dataclass(frozen=True)
class SearchSpace:
    """A compiled space: calling it with an Optuna trial suggests the trial's params.

    In `parameters`, parents come before their children. If `python` is set, it suggests instead,
    and `parameters` only describes what it was seen to suggest.
    """

    name: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    enqueue: tuple[Mapping[str, Any], ...] = ()
    text: str = ""  # YAML that loads as this space again: a run keeps it as space.yaml
    python: Callable[[optuna.trial.BaseTrial], Mapping[str, Any] | None] | None = None
    python_sha256: str | None = None

    def __call__(self, trial: Any) -> dict[str, Any] | None:
        """Suggests a trial's params; afterwards `trial.params` has exactly the active parameters.

        Returns the trial's constants, as Ray's OptunaSearch expects them: a first trial's whole
        config, or what a Python space returned, or None. A first trial outside the space suggests
        nothing: from a part of its params Optuna would learn about a point that was never run, and
        a single unusual set of params splits TPE's groups permanently.
        """
        given = trial.user_attrs.get("config")
        if given is not None and not trial.user_attrs.get("in_space", True):
            return dict(given)
        constants = self._suggest(trial)
        return dict(given) if given is not None else constants

    def _suggest(self, trial: Any) -> dict[str, Any] | None:
        if self.python is not None:
            returned = self.python(trial)
            return dict(returned) if returned else None
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.name] = parameter.suggest(trial)
        return None

    def within(self, check_init: Callable[[str], str | None]) -> SearchSpace:
        """The space without the values of `init` that are listed under `where_possible` and that
        the search cannot use.

        check_init: why the search cannot use a value; None if it can
        Raises ConfigError if the space requires such a value.
        """
        asked = [("fixed", self.fixed.get("init"))]
        asked += [(f"enqueue[{i}]", entry.get("init")) for i, entry in enumerate(self.enqueue)]
        parameters = []
        for parameter in self.parameters:
            distribution = parameter.distribution
            if parameter.name == "init" and isinstance(distribution, CategoricalDistribution):
                asked += [
                    ("parameters", choice)
                    for choice in distribution.choices
                    if choice not in parameter.where_possible
                ]
                parameter = parameter.without(
                    {init for init in parameter.where_possible if check_init(init) is not None}
                )
            parameters.append(parameter)
        messages = [
            f"--space: {self.name}: {where}.{message}"
            for where, init in asked
            if init is not None and (message := check_init(init))
        ]
        if messages:
            raise ConfigError(messages)
        return replace(self, parameters=tuple(parameters))

    @property
    def sampled_names(self) -> tuple[str, ...]:
        """The names of the parameters that trials can have."""
        return tuple(parameter.name for parameter in self.parameters)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Each sampled name's Optuna distribution; the conditions are in `parameters`."""
        return {parameter.name: parameter.distribution for parameter in self.parameters}

    def trial_config(self, params: Mapping[str, Any], base: TrialConfig) -> TrialConfig:
        """The config of a trial: `params` over `fixed` over `base` (SearchConfig.base_trial()).

        A warmup longer than the trial is capped to its steps, so that the config says what was
        trained, even if it is later used for a longer run.

        Raises:
            ConfigError: unknown names or values of the wrong type.
        """
        values = {**self.fixed, **params}
        config = TrialConfig.from_dict(values, base)
        if "warmup_steps" in values and config.warmup_steps > config.steps:
            return replace(config, warmup_steps=config.steps)
        return config

    def longest_warmup(self) -> int:
        """The largest warmup_steps that the space can suggest or fixes; 0 if it does neither."""
        distribution = self.distributions().get("warmup_steps")
        if isinstance(distribution, IntDistribution):
            return distribution.high
        if isinstance(distribution, CategoricalDistribution):
            return max(int(str(choice)) for choice in distribution.choices)
        return int(self.fixed.get("warmup_steps", 0))

    def default_config(self, base: TrialConfig) -> TrialConfig:
        """The documented default as this space runs it: see RUN_FIELDS."""
        shared = {name: value for name, value in self.fixed.items() if name in RUN_FIELDS}
        return TrialConfig.from_dict(shared, base)

    def baselines(self, base: TrialConfig) -> list[TrialConfig]:
        """What the best config is compared with: the documented default, and if its warmup takes
        more than a tenth of the run, the same with a warmup of a tenth. A default that hardly
        reaches its full learning rate would be easy to beat."""
        default = self.default_config(base)
        tenth = replace(default, warmup_steps=math.ceil(default.steps / 10))
        if tenth.num_warmup_steps() >= default.num_warmup_steps():
            return [default]
        return [default, tenth]

    def params_of(self, config: TrialConfig, base: TrialConfig) -> dict[str, Any] | None:
        """The point of the space that trains exactly like `config`, or None.

        Warmup is compared in steps, whether config and space give it in steps or as a ratio.
        """
        values = _with_both_warmups(config)
        for parameter in self.parameters:
            if isinstance(parameter.distribution, IntDistribution) and isinstance(
                values[parameter.name], float
            ):
                values[parameter.name] = round(values[parameter.name])
        trial = optuna.trial.FixedTrial(_without_none_for_numbers(values, self.parameters))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # FixedTrial warns of values outside the space
                constants = self._suggest(trial)
        except ValueError:  # FixedTrial: a suggested name has no value
            return None
        if not all(contains(d, trial.params[name]) for name, d in trial.distributions.items()):
            return None
        reached = self.trial_config({**trial.params, **(constants or {})}, base)
        return trial.params if _normal(reached) == _normal(config) else None

    def nearest(self, config: TrialConfig) -> dict[str, Any]:
        """The config's values of the parameters that exist for it, of a config that need not be a
        point of the space: numbers may be out of bounds, and choices others than the space's."""
        known, values = _with_both_warmups(config), dict[str, Any]()
        for parameter in self.parameters:
            if parameter.active(values):
                values[parameter.name] = known[parameter.name]
        return _without_none_for_numbers(values, self.parameters)

    def drawn(self, draw: Callable[[str, BaseDistribution], Any]) -> dict[str, Any]:
        """The params of a point whose values `draw` chooses, by name and distribution."""
        trial = DrawnTrial(draw)
        self._suggest(trial)
        return trial.drawn

    def first_trials(
        self,
        base: TrialConfig,
        trial: Mapping[str, Any] | None = None,
        earlier: Sequence[TrialConfig] = (),
    ) -> list[FirstTrial]:
        """What runs before anything is suggested, each config once: the baselines, the config of
        `trial` (SearchConfig.trial, from an earlier best.yaml), `enqueue`, then the best configs
        of `earlier` runs."""
        origins = dict.fromkeys(self.baselines(base), "default")
        if trial is not None:
            origins.setdefault(TrialConfig.from_dict(trial, base), "enqueued")
        for params in self.enqueue:
            origins.setdefault(self.trial_config(params, base), "enqueued")
        for config in earlier:
            origins.setdefault(config, "warm_start")
        return [
            FirstTrial(origin, config, self.params_of(config, base))
            for config, origin in origins.items()
        ]

    def expecting(self, priors: Mapping[str, Prior], *, own: bool = True) -> SearchSpace:
        """The space with these priors; other parameters keep their `own`, or have none."""
        old = {p.name: p.prior for p in self.parameters if own}
        parameters = (replace(p, prior={**old, **priors}.get(p.name)) for p in self.parameters)
        return replace(self, parameters=tuple(parameters))

    def sample(self, n: int, seed: int) -> list[dict[str, Any]]:
        """n random points (params, and the constants of a Python space); same for the same seed."""
        with quiet_optuna():
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
            points = []
            for _ in range(n):
                trial = study.ask()
                constants = self._suggest(trial)
                points.append({**trial.params, **(constants or {})})
        return points

    def describe(self) -> str:
        """A table for people: parameter, kind, values and condition; then the fixed values."""
        rows = [(p.name, p.space, _details(p)) for p in self.parameters]
        rows += [(name, "fixed", str(value)) for name, value in self.fixed.items()]
        names, kinds = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{name:{names}}  {kind:{kinds}}  {values}" for name, kind, values in rows)

    def difference(self, other: SearchSpace) -> list[str]:
        """How `other` differs, in words; [] if both spaces can suggest the same configs.

        `enqueue` and priors do not count: they say where to start, not what may be suggested.
        """
        mine, theirs = self._content(), other._content()
        return [
            f"{name}: {mine.get(name, 'absent')}, now {theirs.get(name, 'absent')}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]

    def fingerprint(self) -> str:
        """A hash that is equal exactly where `difference` is empty."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def incompatible_with(self, other: SearchSpace) -> list[str]:
        """Names whose kind or choices differ: Optuna refuses them in one study, even if told to
        accept a changed space. Changed bounds are fine."""
        mine, theirs = self.distributions(), other.distributions()
        names = []
        for name in mine.keys() & theirs.keys():
            try:
                optuna.distributions.check_distribution_compatibility(mine[name], theirs[name])
            except ValueError:
                names.append(name)
        return sorted(names)

    def _content(self) -> dict[str, str]:
        content = {parameter.name: str(parameter) for parameter in self.parameters}
        content |= {name: f"fixed {value}" for name, value in self.fixed.items()}
        if self.python_sha256 is not None:
            content["python"] = f"code {self.python_sha256[:12]}"
        return content


def _details(parameter: Parameter) -> str:
    condition, prior = parameter.condition(), parameter.prior
    parts = [parameter.range(), f"when {condition}" if condition else ""]
    parts.append(f"prior: {prior}" if prior is not None else "")
    return "  ".join(filter(None, parts))


def _normal(config: TrialConfig) -> TrialConfig:
    """Equal for configs that train identically: warmup in the steps that the scheduler gets."""
    return replace(config, warmup_steps=config.num_warmup_steps(), warmup_ratio=None)


def _with_both_warmups(config: TrialConfig) -> dict[str, Any]:
    """The config's values, with the warmup in steps and as a ratio."""
    values = asdict(config)
    if config.warmup_ratio is None:
        warmup = config.num_warmup_steps()
        ratio = warmup / config.steps
        if replace(config, warmup_ratio=ratio).num_warmup_steps() > warmup:
            ratio = math.nextafter(ratio, 0)  # rounding up would give one step too many
        values["warmup_ratio"] = ratio
    else:
        values["warmup_steps"] = config.num_warmup_steps()
    return values


def _without_none_for_numbers(
    values: dict[str, Any], parameters: tuple[Parameter, ...]
) -> dict[str, Any]:
    """Drops numbers that are None, which FixedTrial would compare with bounds."""
    categorical = {
        p.name for p in parameters if isinstance(p.distribution, CategoricalDistribution)
    }
    return {k: v for k, v in values.items() if v is not None or k in categorical}


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """No "A new study created" line for a study that only draws samples."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
