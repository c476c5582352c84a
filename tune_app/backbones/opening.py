"""Opens the backbone that a config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.serve.connection import Connection

if TYPE_CHECKING:  # they import torch
    from tune_app.backbones.protocol import Backbone, PackLimits


def open_backbone(
    config: SearchConfig,
    model: str,
    connection: Connection,
    memory_share: float = 1.0,
    *,
    end_with_client: bool = False,
) -> Backbone:
    """The backbone that the search asks for, with this share of the machine's free memory.

    end_with_client: kill this process when a process of the swarm's client has ended
    Raises BackboneUnavailable, and ConfigError if not even one row would fit into a pack.
    """
    if config.backbone == "swarm":
        from tune_app.backbones.swarm import SwarmBackbone

        swarm = SwarmBackbone(  # `search/checks.py` has checked the length of rows
            model,
            peers=connection.peers,
            dht_prefix=connection.dht_prefix,
            dtype=config.dtype,
            request_tokens=connection.request_tokens,
        )
        if end_with_client:
            swarm.end_process_with_client()
        return swarm
    import torch

    from tune_app.backbones.local import LocalBackbone

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = LocalBackbone(model, device=device, dtype=config.dtype, memory_share=memory_share)
    check_longest_row(config, backbone.limits)
    return backbone


def check_longest_row(config: SearchConfig, limits: PackLimits) -> None:
    """Raises ConfigError if a row's activations do not fit into the memory that is free now."""
    row_tokens = config.prompt_length + config.max_length
    if limits.rows(row_tokens) < 1:
        raise ConfigError(
            [
                f"--prompt-length and --max-length: the activations of one row of {row_tokens} "
                "tokens do not fit into half of the memory that the model leaves free; use shorter "
                "rows, another --dtype or a swarm."
            ]
        )
