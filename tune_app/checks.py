"""All that can be wrong with a search, found before anything starts and reported together."""

from __future__ import annotations

import socket

from optuna.distributions import CategoricalDistribution, IntDistribution

from tune_app.config import ConfigError, SearchConfig, check_search_config
from tune_app.model_folder import model_folder, positions
from tune_app.optuna_space import SearchSpace
from tune_app.search_space import load_space

_PEER_TIMEOUT_S = 5.0


def check_everything(config: SearchConfig) -> SearchSpace:
    """The search's space, once all of the config is found to be usable.

    Raises ConfigError with every mistake.
    """
    messages = check_search_config(config)
    space = None
    try:
        space = load_space(config.space)
    except ConfigError as error:
        messages += error.messages
    if not any(message.startswith("--model") for message in messages):
        messages += _check_model(config, space)
    if config.peers and not any(message.startswith("--peers") for message in messages):
        messages += _check_peers(config)
    if not any(message.startswith(("--train", "--valid", "--test")) for message in messages):
        messages += _check_data(config)
    if messages or space is None:
        raise ConfigError(messages)
    return space


def _check_model(config: SearchConfig, space: SearchSpace | None) -> list[str]:
    from tune_app.checkpoint import check_checkpoint

    try:
        folder = model_folder(config.model)
        messages: list[str] = []
        if config.backbone == "swarm":
            check_checkpoint(folder, messages)
        limit = positions(folder)
    except ConfigError as error:
        return error.messages
    longest = config.prompt_length if space is None else _longest_prompt(config, space)
    if limit is not None and longest + config.max_length > limit:
        messages.append(
            f"--prompt-length and --max-length: {longest} prompt and {config.max_length} text "
            f"tokens make {longest + config.max_length} positions; {config.model} has {limit}."
        )
    return messages


def _longest_prompt(config: SearchConfig, space: SearchSpace) -> int:
    distribution = space.distributions().get("prompt_length")
    if isinstance(distribution, IntDistribution):
        return distribution.high
    if isinstance(distribution, CategoricalDistribution):
        return max(distribution.choices)
    return space.fixed.get("prompt_length", config.prompt_length)


def _check_peers(config: SearchConfig) -> list[str]:
    """Whether anybody listens at one of the peers; hivemind itself would wait for a minute."""
    for peer in config.peers:
        parts = peer.split("/")
        try:
            with socket.create_connection((parts[2], int(parts[4])), timeout=_PEER_TIMEOUT_S):
                return []
        except OSError:
            continue
    return [
        f"--peers: nobody answers within {_PEER_TIMEOUT_S:g} s at {', '.join(config.peers)}; "
        "is the swarm up, and the port reachable from here?"
    ]


def _check_data(config: SearchConfig) -> list[str]:
    if config.train is None:
        return []
    from tune_app.tasks.loading import read_and_check

    try:
        read_and_check(config)
    except ConfigError as error:
        return error.messages
    return []
