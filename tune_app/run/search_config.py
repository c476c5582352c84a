"""The settings of one search: typed, frozen, and all checked before anything starts.

Precedence: the defaults below < the resumed run's `search.yaml` (with --resume) < `--config FILE` <
flags. After parsing, settings are never passed on as a dict. Imports neither torch nor ray, because
every trial actor loads it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from tune_app.run.paths import user_path
from tune_app.run.settings import (
    PriorUse,
    Role,
    parse_duration_s,
    parse_prior_use,
    parse_token_count,
    setting,
    settings_of,
)
from tune_app.run.trial_config import SCHEDULER_ARGUMENTS, TrialConfig, TuningMode
from tune_app.run.typed import ConfigError, convert_fields, did_you_mean, one_of, read_yaml

__all__ = [
    "SCHEDULER_ARGUMENTS",
    "BackboneKind",
    "ConfigError",
    "SearchConfig",
    "TrialConfig",
    "TuningMode",
    "did_you_mean",
    "one_of",
]

BackboneKind = Literal["swarm", "local"]
ExecutorKind = Literal["ray", "in-process"]
TrialScheduler = Literal["asha", "median", "hyperband", "pbt", "none"]
Sampler = Literal["tpe", "random", "gp", "cmaes"]

# Seeds that can judge one config: the numbers of confirmation runs have room for no more.
MOST_CONFIRM_SEEDS = 96

# Headings of --help.
_WHAT = "what to search"
DATA = "data"
_MODEL = "model and swarm"
_TRIAL = "each trial"
_HOW = "how to search, and how long"
_RUN = "the run"

_COMPARABLE = Role.SAME | Role.TRAINING | Role.PROMPTS
_OF_A_TRIAL = Role.SAME | Role.TRIAL | Role.TRAINING


@dataclass(frozen=True)
class SearchConfig:
    """All flags of `python -m tune_app.search`, under the same names."""

    space: str = setting(
        "default",
        _WHAT,
        "a name in search_spaces/, a .yaml file, or an Optuna define-by-run function as "
        "module:function or file.py:function",
    )
    task: str = setting(
        "classification",
        _WHAT,
        "what the prompts are tuned for: classification, causal-lm or regression (a number for "
        "each text)",
        roles=Role.SAME | Role.TRAINING,
    )
    train: str | None = setting(
        None,
        DATA,
        "training file: csv, tsv, jsonl, json, parquet or txt, a path or a URL that pandas opens; "
        "without it, the built-in text of the task",
        roles=_COMPARABLE,
    )
    valid: str | None = setting(
        None, DATA, "validation file; without it, a tenth of --train", roles=_COMPARABLE
    )
    test: str | None = setting(
        None,
        DATA,
        "test file, which only the confirmation uses; without it, a tenth of --train",
        roles=_COMPARABLE,
    )
    text_column: str | None = setting(
        None, DATA, "column with the text in your files", roles=_COMPARABLE
    )
    label_column: str | None = setting(
        None, DATA, "column with the label: a class, or for regression a number", roles=_COMPARABLE
    )
    prompt_column: str | None = setting(
        None,
        DATA,
        "column with the prompt, whose completion is learned (causal-lm); a column with chats must "
        "be called messages",
        roles=_COMPARABLE,
    )
    completion_column: str | None = setting(
        None,
        DATA,
        "column with the completion; only its tokens count in the loss",
        roles=_COMPARABLE,
    )
    encoding: str | None = setting(
        None,
        DATA,
        "encoding of text files: cp1252, utf-16, ...; without it, UTF-8, or as a byte order mark "
        "says",
        roles=Role.TRAINING | Role.PROMPTS,
    )
    delimiter: str | None = setting(
        None,
        DATA,
        "separator of fields in csv and tsv: one character, or tab; without it, guessed from the "
        "file",
        roles=Role.TRAINING | Role.PROMPTS,
    )
    model: str = setting(
        "demo",
        _MODEL,
        "demo, a model's folder, or its name on a hub (organisation/name)",
        roles=Role.SAME | Role.TRAINING,
    )
    revision: str | None = setting(
        None,
        _MODEL,
        "branch, tag or commit of a model on a hub; without it, the main branch",
        roles=Role.SAME | Role.TRAINING,
    )
    backbone: BackboneKind = setting(
        "swarm",
        _MODEL,
        "where the frozen blocks run: on Petals servers (swarm) or in this process (local)",
        roles=Role.TRAINING | Role.PROMPTS,
    )
    peers: tuple[str, ...] = setting(
        (),
        _MODEL,
        "multiaddresses of your swarm's servers; without any, a private swarm is started",
        roles=Role.TRAINING | Role.PROMPTS,
    )
    request_tokens: int | None = setting(
        None,
        _MODEL,
        "tokens (rows times length) that your servers accept in one request (their "
        "--max_batch_size); without it 1024, which Petals' client sends",
        roles=Role.TRAINING,
        at_least=1,
    )
    device: str | None = setting(
        None,
        _MODEL,
        "cpu, cuda, cuda:1 or mps; without it, cuda if available, else cpu",
        roles=Role.TRAINING,
    )
    dtype: str = setting(
        "float32", _MODEL, "of the frozen model: float32, bfloat16 or float16", roles=_COMPARABLE
    )
    tuning_mode: TuningMode = setting(
        "ptune",
        _TRIAL,
        "prompts in front of the input (ptune), or in every block as well (deep_ptune)",
        roles=_OF_A_TRIAL,
    )
    prompt_length: int = setting(8, _TRIAL, "prompt tokens", roles=_OF_A_TRIAL, at_least=1)
    init_text: str | None = setting(
        None,
        _TRIAL,
        "text that prompts start from if a config's init is text: words that describe the task, "
        "repeated or cut to the prompt's length",
        roles=_COMPARABLE,
    )
    steps: int = setting(
        60, _TRIAL, "optimizer steps of a full trial", roles=_OF_A_TRIAL, at_least=1
    )
    batch_size: int = setting(8, _TRIAL, "rows per step", roles=_OF_A_TRIAL, at_least=1)
    max_length: int = setting(
        48,
        _TRIAL,
        "most tokens of text in a row, not counting the prompt",
        roles=Role.SAME | Role.TRAINING,
        at_least=1,
    )
    eval_rows: int = setting(
        128,
        _TRIAL,
        "validation rows that trials are compared on: a sample, stratified by class",
        roles=Role.SAME | Role.TRAINING,
        at_least=1,
    )
    trials: int = setting(
        16, _HOW, "trials of the search, including the documented default", at_least=1
    )
    time_budget: float | None = setting(
        None,
        _HOW,
        "stop after this time: seconds, or 10m, 2h",
        parse=parse_duration_s,
        at_least=1,
    )
    token_budget: int | None = setting(
        None,
        _HOW,
        "stop after training on this many tokens: 5e6, 5M",
        parse=parse_token_count,
        at_least=1,
    )
    concurrency: int | None = setting(
        None,
        _HOW,
        "trials that train concurrently; without it, chosen for the model and the machine",
        at_least=1,
    )
    sampler: Sampler = setting(
        "gp",
        _HOW,
        "what suggests the configs: our Gaussian process, or one of Optuna's samplers",
    )
    prior: PriorUse = setting(
        "on",
        _HOW,
        "off: ignore the space's priors (where it expects good values)",
        parse=parse_prior_use,
    )
    warm_start: tuple[Path, ...] = setting(
        (),
        _HOW,
        "folders of earlier runs, with other data or another model, say: their best configs run "
        "first, and what ranked high in them is tried more often",
        roles=Role.ONE_CALL,
    )
    scheduler: TrialScheduler = setting(
        "asha",
        _HOW,
        "Ray Tune's trial scheduler, which stops bad trials early; pbt instead changes trials "
        "while they train",
    )
    objective: str = setting(
        "loss",
        _HOW,
        "what is optimised and judged: loss; accuracy or f1 (macro) for classification; "
        "perplexity for causal-lm",
    )
    confirm: int = setting(
        2,
        _HOW,
        "how many of the best configs are trained again with fresh seeds; the best of them by "
        "validation is compared with the default on the test split",
        at_least=0,
    )
    confirm_seeds: int = setting(
        6,
        _HOW,
        "further seeds for that comparison: 3, and up to this many while it is undecided",
        at_least=1,
    )
    seed: int = setting(
        0,
        _HOW,
        "seed of the suggestions, the data order and the prompts' initialisation",
        roles=Role.TRIAL | Role.TRAINING,
        at_least=0,
    )
    out: Path | None = setting(
        None,
        _RUN,
        "folder of the run; without it, runs/<date>-<time>",
        roles=Role.ONE_CALL | Role.TRAINING,
    )
    resume: Path | None = setting(
        None,
        _RUN,
        "folder of a run to continue; with more --trials, also a finished one",
        roles=Role.ONE_CALL,
    )
    allow_changed_space: bool = setting(
        False,
        _RUN,
        "resume even though the space, model or data differ from the original run",
        roles=Role.ONE_CALL,
    )
    storage: str | None = setting(
        None, _RUN, "Optuna storage URL; without it, the study is in the run's folder"
    )
    mlflow: str | None = setting(
        None, _RUN, "tracking URI of an MLflow server to log to as well: http://127.0.0.1:5000"
    )
    wandb: str | None = setting(None, _RUN, "Weights & Biases project to log to as well")
    executor: ExecutorKind = setting(
        "ray", _RUN, "ray, or in-process: trials are threads of the command, for debugging"
    )
    address: str | None = setting(
        None, _RUN, "Ray cluster to join (host:port or auto); without it, Ray is started here"
    )
    hosts: int | None = setting(
        None,
        _RUN,
        "trial hosts, each with its copy of the model; without it, one per GPU or node, or on a "
        "CPU one per 4 concurrent trials",
        at_least=1,
    )
    dry_run: bool = setting(
        False,
        _RUN,
        "print the space, sample configs and the estimated cost, and start nothing",
        roles=Role.ONE_CALL,
    )
    quiet: bool = setting(False, _RUN, "print only the result", roles=Role.TRAINING)
    verbose: bool = setting(False, _RUN, "print everything, including the logs of Ray and Petals")
    trial: dict[str, Any] | None = setting(
        None, "", "best.yaml's config, which runs right after the default", roles=Role.TRAINING
    )

    def base_trial(self) -> TrialConfig:
        """The documented default with this search's batch size, prompt and steps: trial 0, and the
        value of every parameter outside the search space."""
        return TrialConfig(**{name: getattr(self, name) for name in settings_with(Role.TRIAL)})

    def anchored(self) -> SearchConfig:
        """The same config with absolute paths for local files, so that it is valid in any working
        directory; names and URLs stay."""
        names = ["train", "valid", "test"]
        if self.model != "demo":
            names.append("model")
        if Path(self.space).suffix in (".yaml", ".yml"):
            names.append("space")
        paths: dict[str, Any] = {name: _anchored(getattr(self, name)) for name in names}
        return replace(self, **paths)

    def to_yaml(self) -> str:
        """The config as YAML for --config: all keys but those that concern one call, with absolute
        paths.

        best.yaml is `dataclasses.replace(config, trial=best.to_dict()).to_yaml()`.
        """
        values, left_out = asdict(self.anchored()), settings_with(Role.ONE_CALL)
        settings = {k: v for k, v in values.items() if k not in left_out}
        settings["peers"] = list(self.peers)
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, path: Path) -> SearchConfig:
        """The config in a YAML file, over the defaults.

        Raises:
            ConfigError: unreadable, not YAML, unknown keys, values of the wrong type.
        """
        values, messages = read_settings(path)
        if messages:
            raise ConfigError(messages)
        return cls(**values)


SETTINGS = settings_of(SearchConfig)


def settings_with(role: Role) -> tuple[str, ...]:
    """Names of the settings that have the role."""
    return tuple(name for name, known in SETTINGS.items() if role in known.roles)


def settings_under(group: str) -> tuple[str, ...]:
    """Names of the settings under a heading of --help."""
    return tuple(name for name, known in SETTINGS.items() if known.group == group)


def _anchored(path: str | None) -> str | None:
    if path is None or "://" in path or not os.path.exists(user_path(path)):
        return path
    return str(user_path(path).absolute())


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in a YAML file, converted, and what is wrong with the rest of it."""
    try:
        _, mapping = read_yaml(path)
    except ConfigError as error:
        return {}, error.messages
    return convert_fields(SearchConfig, mapping, label=lambda key: f"{path}: {key}")
