"""Which swarm the trial hosts connect to, and the private one where the user named none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tune_app.run.search_config import SearchConfig
from tune_app.serve.checks import dht_prefix_of
from tune_app.serve.supervisor import PrivateSwarm

# Tokens in one request to the private swarm. Its servers take twice as many; beyond this, requests
# only take longer: with 100 rows of 40 tokens 300 rows/s, with 128 rows 312, with 25 rows 190.
_PRIVATE_REQUEST_TOKENS = 4096
# What Petals' client sends at once (petals.client.sequential_autograd.MAX_TOKENS_IN_BATCH), and so
# what every server is made to take.
PETALS_REQUEST_TOKENS = 1024


@dataclass(frozen=True)
class Connection:
    """The swarm that hosts connect to; no peers and no prefix for a local backbone.

    request_tokens: rows times positions that one request may have; None: no requests, it is local
    """

    peers: tuple[str, ...] = ()
    dht_prefix: str | None = None
    request_tokens: int | None = None


def request_tokens(config: SearchConfig) -> int:
    """Rows times positions that one request to the search's swarm may have."""
    if config.peers:
        return config.request_tokens or PETALS_REQUEST_TOKENS
    return _PRIVATE_REQUEST_TOKENS


def start_private_swarm(
    config: SearchConfig, model: Path, *, progress: Callable[[str], None]
) -> PrivateSwarm | None:
    """The swarm that the search needs besides its own; starts in the background."""
    if config.backbone != "swarm" or config.peers:
        return None
    progress("starting a private swarm on 127.0.0.1")
    # It is the same machine: bfloat16 and the device are the servers' too.
    return PrivateSwarm(
        model,
        device=config.device or "cpu",
        dtype=config.dtype,
        max_batch_tokens=2 * _PRIVATE_REQUEST_TOKENS,
    )


def connection_to(config: SearchConfig, model: Path, private: PrivateSwarm | None) -> Connection:
    """Where `model`, the folder of config.model, is computed; `private` has to be ready."""
    if private is not None:
        return Connection(tuple(private.peers), private.dht_prefix, request_tokens(config))
    if config.backbone == "swarm":
        prefix = dht_prefix_of(model, config.model)
        return Connection(config.peers, prefix, request_tokens(config))
    return Connection()
