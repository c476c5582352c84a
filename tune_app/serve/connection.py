"""Which swarm the trial hosts connect to, and the private swarm if the user named none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tune_app.run.search_config import SearchConfig
from tune_app.serve.checks import dht_prefix_of
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import PrivateSwarm

# Tokens in one request to the private swarm. Its servers accept twice as many, but larger requests
# gain little: with 25 rows of 40 tokens 190 rows/s, with 100 rows 300, with 128 rows 312.
_PRIVATE_REQUEST_TOKENS = 4096
# Petals' client sends this many (petals.client.sequential_autograd.MAX_TOKENS_IN_BATCH), so every
# server accepts them.
PETALS_REQUEST_TOKENS = 1024


@dataclass(frozen=True)
class Connection:
    """The swarm that hosts connect to; no peers and no prefix for a local backbone.

    request_tokens: rows times positions allowed in one request; None for a local backbone
    """

    peers: tuple[str, ...] = ()
    dht_prefix: str | None = None
    request_tokens: int | None = None


def request_tokens(config: SearchConfig) -> int:
    """Rows times positions allowed in one request to the search's swarm."""
    if config.peers:
        return config.request_tokens or PETALS_REQUEST_TOKENS
    return _PRIVATE_REQUEST_TOKENS


def start_private_swarm(
    config: SearchConfig, model: Path, *, progress: Callable[[str], None]
) -> PrivateSwarm | None:
    """The private swarm, if the search needs one; starts in the background."""
    if config.backbone != "swarm" or config.peers:
        return None
    progress("starting a private swarm on 127.0.0.1")
    # It runs on the same machine, so the servers use the same dtype and device.
    return PrivateSwarm(
        ServeConfig(
            model,
            device=config.device,
            dtype=config.dtype,
            max_batch_tokens=2 * _PRIVATE_REQUEST_TOKENS,
        )
    )


def connection_to(config: SearchConfig, model: Path, private: PrivateSwarm | None) -> Connection:
    """The connection to the servers of `model`, the folder of config.model; `private`, if any, must
    be ready."""
    if private is not None:
        return Connection(tuple(private.peers), private.dht_prefix, request_tokens(config))
    if config.backbone == "swarm":
        prefix = dht_prefix_of(model, config.model)
        return Connection(config.peers, prefix, request_tokens(config))
    return Connection()
