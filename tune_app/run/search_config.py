"""What one search is told: typed, frozen, checked whole before anything starts.

Precedence: the defaults below < the searched run's own `search.yaml` (with --resume) < `--config
FILE` < flags. Below this module no dict of settings is passed on. Imports neither torch nor ray,
because every trial actor loads it.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from tune_app.run.trial_config import SCHEDULER_ARGUMENTS, Init, TrialConfig, TuningMode
from tune_app.run.typed import ConfigError, convert, convert_fields, did_you_mean, one_of, read_yaml

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
PriorUse = Literal["on", "off"]

# What belongs to one call of the command and not to the search; `to_yaml` leaves it out, so that
# best.yaml and search.yaml start a new run in a new folder when they are given to --config.
ONE_CALL_ONLY = ("out", "resume", "allow_changed_space", "dry_run")

# Fresh seeds of one config that its runs' numbers have room for, less those that choose.
MOST_CONFIRM_SEEDS = 96

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_TOKENS = {"k": 1e3, "m": 1e6, "b": 1e9}


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
    """on or off, which YAML reads as booleans where they are not quoted."""
    text: Any = ("on" if value else "off") if isinstance(value, bool) else value
    if text not in get_args(PriorUse):
        raise ValueError(one_of(text, get_args(PriorUse)))
    return text


@dataclass(frozen=True)
class SearchConfig:
    """All flags of `python -m tune_app.search`, under the same names; flags.py has their --help."""

    space: str = "default"
    task: str = "classification"  # tasks/known.py has them
    train: str | None = None  # None: the built-in text of the task
    valid: str | None = None  # None with `train` given: a tenth of it
    test: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    encoding: str | None = None  # None: UTF-8, or what a byte order mark says
    delimiter: str | None = None  # of csv and tsv; None: from the file
    eval_rows: int = 128  # validation rows that trials are compared on
    model: str = "demo"
    revision: str | None = None  # of a hub's model: branch, tag or commit; None: its main branch
    backbone: BackboneKind = "swarm"
    peers: tuple[str, ...] = ()  # empty: a private swarm is started
    request_tokens: int | None = None  # None: as many as Petals' client sends
    tuning_mode: TuningMode = "ptune"
    prompt_length: int = 8
    init_text: str | None = None  # what prompts of init "text" begin with
    trials: int = 16
    concurrency: int | None = None  # None: from the model, the limits and the machine
    steps: int = 60
    batch_size: int = 8
    max_length: int = 48  # tokens of text in one row, without the prompt
    seed: int = 0
    device: str | None = None  # None: cuda where there is one, else cpu
    dtype: str = "float32"
    executor: ExecutorKind = "ray"
    address: str | None = None  # an existing Ray cluster
    out: Path | None = None  # None: runs/<date>-<time>
    trial: dict[str, Any] | None = None  # best.yaml's config: runs second, after the default
    scheduler: TrialScheduler = "asha"
    sampler: Sampler = "tpe"
    prior: PriorUse = field(default="on", metadata={"parse": parse_prior_use})  # of the space
    time_budget: float | None = field(default=None, metadata={"parse": parse_duration_s})  # seconds
    token_budget: int | None = field(default=None, metadata={"parse": parse_token_count})
    objective: str = "loss"  # tasks/objectives.py has them; the task says which it knows
    confirm: int = 3  # the best configs, of which one is chosen with fresh seeds and judged
    confirm_seeds: int = 6  # that the best and the default are judged with at most
    resume: Path | None = None
    allow_changed_space: bool = False
    storage: str | None = None  # None: the study is kept in the run's folder
    mlflow: str | None = None  # tracking URI of MLflow, which gets every trial as well
    wandb: str | None = None  # project of Weights & Biases, likewise
    dry_run: bool = False
    hosts: int | None = None  # trial hosts; None: `cluster.py` decides
    quiet: bool = False
    verbose: bool = False

    def base_trial(self) -> TrialConfig:
        """The documented default at this search's batch, prompt and length: trial 0, and what
        every parameter outside of the search space is set to."""
        return TrialConfig(
            tuning_mode=self.tuning_mode,
            prompt_length=self.prompt_length,
            batch_size=self.batch_size,
            steps=self.steps,
            seed=self.seed,
        )

    def inits(self) -> tuple[str, ...]:
        """The values of TrialConfig.init that this search has tokens for."""
        labels = ("labels",) if self.task == "classification" else ()
        return ("normal", "vocab", *labels, *(("text",) if self.init_text else ()))

    def check_init(self, init: str) -> str | None:
        """What keeps a config of this search from that init; None if it can begin so."""
        if init in self.inits():
            return None
        reason = {
            "text": "needs --init-text, the words to begin with",
            "labels": f"needs class names, and --task {self.task} has none",
        }
        return f"init: {init!r} {reason[init]}; this search has {', '.join(self.inits())}."

    def to_yaml(self) -> str:
        """The config as YAML for --config: all keys except those of one call (`ONE_CALL_ONLY`).

        best.yaml is `dataclasses.replace(config, trial=best.to_dict()).to_yaml()`.
        """
        settings = {k: v for k, v in asdict(self).items() if k not in ONE_CALL_ONLY}
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


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings that a YAML file gives, converted, and what is wrong with the rest of it."""
    try:
        _, mapping = read_yaml(path)
    except ConfigError as error:
        return {}, error.messages
    return convert_fields(SearchConfig, mapping, label=lambda key: f"{path}: {key}")


def check_search_config(config: SearchConfig) -> list[str]:
    """Everything that can be found wrong before torch, Ray or a swarm starts; [] if all is well.

    The messages name flags. The task, the space, and whether files fit them, are checked where
    they are loaded.
    """
    return [
        *_check_numbers(config),
        *_check_data(config),
        *_check_model(config),
        *_check_run(config),
        *_check_trial(config),
    ]


def _check_numbers(config: SearchConfig) -> list[str]:
    at_least = dict.fromkeys(
        ("trials", "steps", "batch_size", "prompt_length", "max_length", "eval_rows"), 1
    )
    at_least |= {"concurrency": 1, "hosts": 1, "confirm": 0, "confirm_seeds": 1, "seed": 0}
    at_least |= {"request_tokens": 1, "token_budget": 1, "time_budget": 1}
    messages = [
        f"--{name.replace('_', '-')}: must be {least} or more, got {getattr(config, name)}."
        for name, least in at_least.items()
        if getattr(config, name) is not None and getattr(config, name) < least
    ]
    if config.confirm_seeds > MOST_CONFIRM_SEEDS:
        messages.append(
            f"--confirm-seeds: must be {MOST_CONFIRM_SEEDS} or less, got {config.confirm_seeds}."
        )
    return messages


def _check_data(config: SearchConfig) -> list[str]:
    messages = []
    if config.delimiter is not None and not re.fullmatch(r".|\t|tab|\\t", config.delimiter):
        messages.append(f"--delimiter: must be one character or tab, got {config.delimiter!r}.")
    for name in ("train", "valid", "test"):
        source = getattr(config, name)
        if source is None:
            continue
        if name != "train" and config.train is None:
            messages.append(f"--{name}: needs --train, got {source!r} alone.")
        if "://" in source:  # fetched when it is read
            continue
        path = Path(source).expanduser()
        if not path.is_file():
            messages.append(f"--{name}: there is no file {source!r}.")
        elif path.stat().st_size == 0:
            messages.append(f"--{name}: the file {source!r} is empty.")
    for name in ("text_column", "label_column"):
        column, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if column is not None and config.train is None:
            messages.append(
                f"{flag}: names a column of your own data, got {column!r} but no --train."
            )
    return messages


# Petals needs the peer's identity at the end: /ip4/10.1.2.3/tcp/31337/p2p/12D3Koo...
_MULTIADDRESS = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/(tcp|udp)/(?P<port>\d+)(/[^/]+)*/p2p/[0-9A-Za-z]{20,}"
)


def _check_model(config: SearchConfig) -> list[str]:
    messages = []
    folder = Path(config.model).expanduser()
    if config.model == "demo":
        pass
    elif folder.is_dir():
        if not (folder / "config.json").is_file():
            messages.append(f"--model: the folder {config.model!r} has no config.json.")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", config.model):
        messages.append(
            "--model: must be demo, a model's folder or a hub name (organisation/name); "
            f"{config.model!r} is none of them.{did_you_mean(config.model, ['demo'])}"
        )
    if config.peers and config.backbone != "swarm":
        messages.append(f"--peers: only with --backbone swarm, got --backbone {config.backbone}.")
    if config.request_tokens is not None and not config.peers:
        messages.append("--request-tokens: is for servers of your own; give their --peers as well.")
    for peer in config.peers:
        if not _is_multiaddress(peer):
            messages.append(
                "--peers: must be multiaddresses such as /ip4/10.1.2.3/tcp/31337/p2p/12D3Koo..., "
                f"got {peer!r}."
            )
    # No float64: no server of Petals serves it, and transformers' attention fails in it (Llama,
    # Falcon) or computes in float32 all the same.
    dtypes = ("float32", "bfloat16", "float16")
    if config.dtype not in dtypes:
        messages.append(f"--dtype: {one_of(config.dtype, dtypes)}")
    if config.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", config.device):
        messages.append(f"--device: must be cpu, cuda, cuda:N or mps, got {config.device!r}.")
    return messages


def _is_multiaddress(peer: str) -> bool:
    match = _MULTIADDRESS.fullmatch(peer)
    if match is None or not 0 < int(match["port"]) < 65536:
        return False
    if peer.startswith(("/ip4/", "/ip6/")):
        try:
            return ipaddress.ip_address(match["host"]).version == int(peer[3])
        except ValueError:
            return False
    return True


def _check_run(config: SearchConfig) -> list[str]:
    messages = []
    if config.resume is not None:
        if not (config.resume / "events.jsonl").is_file():
            messages.append(f"--resume: {str(config.resume)!r} holds no run (no events.jsonl).")
    else:
        if config.out is not None and (config.out / "events.jsonl").exists():
            messages.append(
                f"--out: {str(config.out)!r} holds another run; choose another folder, "
                f"or go on with that run: --resume {shlex.quote(str(config.out))}"
            )
        if config.allow_changed_space:
            messages.append("--allow-changed-space: only with --resume.")
    if config.init_text is not None and not config.init_text.strip():
        messages.append("--init-text: must hold at least one word, got none.")
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        messages.append(f"--out: must be a folder, {str(config.out)!r} is a file.")
    if config.storage is not None and "://" not in config.storage:
        messages.append(
            f"--storage: must be a URL such as sqlite:////folder/study.db, got {config.storage!r}."
        )
    if config.executor == "in-process":
        needs_ray = {
            name: getattr(config, name) for name in ("address", "hosts", "mlflow", "wandb")
        }
        needs_ray["scheduler"] = "pbt" if config.scheduler == "pbt" else None
        messages += [
            f"--{name}: needs Ray, got {value!r} with --executor in-process."
            for name, value in needs_ray.items()
            if value is not None
        ]
    if config.quiet and config.verbose:
        messages.append("--quiet: contradicts --verbose; give one of them.")
    return messages


def _check_trial(config: SearchConfig) -> list[str]:
    if config.trial is None:
        return []
    try:
        trial = TrialConfig.from_dict(config.trial, config.base_trial())
    except ConfigError as error:
        messages = error.messages
    else:
        messages = trial.check()
        if trial.init in get_args(Init) and (message := config.check_init(trial.init)):
            messages.append(message)
    return [f"trial: {message}" for message in messages]
