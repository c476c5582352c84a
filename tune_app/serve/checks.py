"""Checks the settings of a swarm's servers before any process is started."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tune_app.models.checks import check_checkpoint
from tune_app.run.paths import user_path
from tune_app.run.search_config import ConfigError, did_you_mean
from tune_app.serve.serve_config import ServeConfig

DTYPES = ("float32", "bfloat16", "float16")
_MADDR = re.compile(
    r"/(?:ip4|ip6|dns|dns4|dns6)/(?P<host>[^/]+)/tcp/(?P<port>\d+)(?:/[^/]+)*/p2p/\w+"
)
ANSWER_S = 5.0
# Without its own requirements, which conflict with all others (requirements.txt).
INSTALL_PETALS = "pip install --no-deps petals==2.2.0.post1"


def check_petals() -> list[str]:
    """The message if Petals is not installed; imports nothing."""
    if find_spec("petals") is not None:
        return []
    return [f"a swarm needs petals: {INSTALL_PETALS} (or use --backbone local)"]


def check_swarm(config: ServeConfig) -> int:
    """Number of the model's blocks; raises ConfigError with all mistakes."""
    mistakes = check_petals()
    layers = check_checkpoint(Path(config.model), mistakes)
    first, end = config.span(layers)
    if config.blocks and layers and not 0 <= first < end <= layers:
        mistakes.append(
            f"blocks must be FIRST:END within 0:{layers} (the model's blocks), got {first}:{end}."
        )
    elif config.servers < 1 or (layers and config.servers > end - first):
        most = (layers and end - first) or "the number of the model's blocks"
        mistakes.append(f"servers must be from 1 to {most} (its blocks), got {config.servers}.")
    if config.replicas < 1:
        mistakes.append(f"replicas must be at least 1, got {config.replicas}.")
    if config.dtype not in DTYPES:
        mistakes.append(
            f"dtype must be one of {', '.join(DTYPES)}, got {config.dtype!r}."
            + did_you_mean(config.dtype, DTYPES)
        )
    elif config.dtype == "float16" and config.device == "cpu":
        mistakes.append("dtype float16 is not possible on a cpu; use float32 or bfloat16.")
    count = max(config.servers, 1) * max(config.replicas, 1)
    if config.announce_ports and len(config.announce_ports) != count:
        mistakes.append(
            f"announce_ports must have one port for each of {count} servers, "
            f"got {config.announce_ports}."
        )
    _check_ports(config.host, config.port, count, mistakes)
    _check_join(config.join, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    return layers


def _check_ports(host: str, port: int, count: int, mistakes: list[str]) -> None:
    try:
        of_this_machine = _listens(host, 0)
    except OSError as error:
        mistakes.append(f"the address to listen on must be an IP address, got {host!r} ({error}).")
        return
    if not of_this_machine:
        mistakes.append(
            f"the address to listen on must be one of this machine's, or 0.0.0.0 for all of them, "
            f"got {host}."
        )
    elif port and not 0 < port <= 65536 - count:
        mistakes.append(f"port must be from 1 to {65536 - count}, or 0 for a free one; got {port}.")
    elif port:
        for number in range(port, port + count):
            if not _listens(host, number):
                mistakes.append(
                    f"port {number} on {host} is in use; choose another, or 0 for a free one."
                )


def _listens(host: str, port: int) -> bool:
    """Whether this machine can listen there. Raises OSError if `host` is not an IP address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.inet_pton(family, host)
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _check_join(join: Sequence[str], mistakes: list[str]) -> None:
    for maddr in join:
        if not _MADDR.fullmatch(maddr):
            mistakes.append(
                f"an address to join must be as servers print it, such as "
                f"/ip4/10.1.2.3/tcp/31337/p2p/12D3KooW..., got {maddr!r}."
            )
        elif not answers(maddr):
            mistakes.append(f"no answer from {maddr}: is that server running?")


def answers(maddr: str, within_s: float = ANSWER_S) -> bool:
    """Whether this address of a server accepts connections."""
    where = _MADDR.match(maddr)
    if where is None:
        return False
    try:
        socket.create_connection((where["host"], int(where["port"])), within_s).close()
    except OSError:
        return False
    return True


def dht_prefix_of(folder: str | Path, name: str | None = None) -> str:
    """The name of a model's blocks in a swarm, by Petals' own rule for hub names.

    name: the hub name or folder that the user gave, if `folder` is a copy of it in a cache.
    So a folder `Llama-3.1-8B` finds servers that were started with `meta-llama/Llama-3.1-8B`.
    """
    folder = Path(folder).resolve()
    on_hub = name is not None and "/" in name and not os.path.isdir(user_path(name))
    named = Path(name) if name is not None and on_hub else folder
    name = re.sub(r"[.\s]", "-", named.name)  # both have a meaning in hivemind's keys
    family = json.loads((folder / "config.json").read_text())["model_type"]
    suffix = {"llama": "-hf", "bloom": "-petals"}.get(family, "")
    return name if name.endswith(suffix) else name + suffix
