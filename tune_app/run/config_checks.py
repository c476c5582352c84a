"""Checks that need only the settings of a search: numbers, paths, addresses."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from pathlib import Path

from tune_app.run.paths import user_path
from tune_app.run.search_config import MOST_CONFIRM_SEEDS, SETTINGS, SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.typed import ConfigError, did_you_mean, one_of


def check_search_config(config: SearchConfig) -> list[str]:
    """All mistakes that can be found before torch, Ray or a swarm starts; [] if there are none.

    The messages name flags. The task and the space, and whether the files fit them, are checked
    when they are loaded.
    """
    return [
        *_check_numbers(config),
        *_check_data(config),
        *_check_model(config),
        *_check_run(config),
        *_check_trial(config),
    ]


def _check_numbers(config: SearchConfig) -> list[str]:
    messages = [
        f"--{name.replace('_', '-')}: must be {known.at_least} or more, got {value}."
        for name, known in SETTINGS.items()
        if (value := getattr(config, name)) is not None
        and known.at_least is not None
        and value < known.at_least
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
            messages.append(f"--{name}: needs --train as well, got only {source!r}.")
        if "://" in source:  # fetched when it is read
            continue
        path = user_path(source)
        if not os.path.isfile(path):
            messages.append(f"--{name}: there is no file {source!r}.")
        elif path.stat().st_size == 0:
            messages.append(f"--{name}: the file {source!r} is empty.")
    for name in ("text_column", "label_column", "prompt_column", "completion_column"):
        column, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if column is not None and config.train is None:
            messages.append(f"{flag}: is for your own data, got {column!r} without --train.")
    return messages


# Petals needs the peer's identity at the end: /ip4/10.1.2.3/tcp/31337/p2p/12D3Koo...
_MULTIADDRESS = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/(tcp|udp)/(?P<port>\d+)(/[^/]+)*/p2p/[0-9A-Za-z]{20,}"
)


def _check_model(config: SearchConfig) -> list[str]:
    messages = []
    folder = user_path(config.model)
    if config.model == "demo":
        pass
    elif os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            messages.append(f"--model: the folder {config.model!r} has no config.json.")
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", config.model):
        messages.append(
            "--model: must be demo, a model's folder or a hub name (organisation/name), got "
            f"{config.model!r}.{did_you_mean(config.model, ['demo'])}"
        )
    if config.peers and config.backbone != "swarm":
        messages.append(f"--peers: only with --backbone swarm, got --backbone {config.backbone}.")
    if config.request_tokens is not None and not config.peers:
        messages.append("--request-tokens: only with --peers, for servers of your own.")
    for peer in config.peers:
        if not _is_multiaddress(peer):
            messages.append(
                "--peers: must be multiaddresses such as /ip4/10.1.2.3/tcp/31337/p2p/12D3Koo..., "
                f"got {peer!r}."
            )
    # No float64: Petals servers do not offer it, and transformers' attention either fails (Llama,
    # Falcon) or computes in float32 anyway.
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
            messages.append(
                f"--resume: there is no run in {str(config.resume)!r} (no events.jsonl)."
            )
    else:
        if config.out is not None and (config.out / "events.jsonl").exists():
            messages.append(
                f"--out: {str(config.out)!r} already contains a run; choose another folder, "
                f"or resume that run: --resume {shlex.quote(str(config.out))}"
            )
        if config.allow_changed_space:
            messages.append("--allow-changed-space: only with --resume.")
    if config.init_text is not None and not config.init_text.strip():
        messages.append("--init-text: must contain at least one word, got none.")
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        messages.append(f"--out: must be a folder, but {str(config.out)!r} is a file.")
    elif not config.resume and (place := _unwritable(config.out or Path("runs"))):
        messages.append(f"--out: {str(place)!r} cannot be written; choose another folder.")
    if config.storage is not None and "://" not in config.storage:
        messages.append(
            f"--storage: must be a URL such as sqlite:////folder/study.db, got {config.storage!r}."
        )
    if config.executor == "in-process":
        needs_ray = {name: getattr(config, name) for name in ("address", "hosts")}
        needs_ray["scheduler"] = "pbt" if config.scheduler == "pbt" else None
        messages += [
            f"--{name}: needs Ray, got {value!r} with --executor in-process."
            for name, value in needs_ray.items()
            if value is not None
        ]
    if config.quiet and config.verbose:
        messages.append("--quiet: contradicts --verbose; give one of them.")
    return messages


def _unwritable(folder: Path) -> Path | None:
    """The path that keeps the folder from being created or written to; None if it is writable."""
    place = user_path(folder).absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    return None if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else place


def _check_trial(config: SearchConfig) -> list[str]:
    if config.trial is None:
        return []
    try:
        trial = TrialConfig.from_dict(config.trial, config.base_trial())
    except ConfigError as error:
        messages = error.messages
    else:
        messages = trial.check()
    return [f"trial: {message}" for message in messages]
