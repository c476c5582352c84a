"""What a checkpoint holds. Apart from the loop, so that a search exports without transformers."""

from __future__ import annotations

import io
from typing import Any

import torch

from tune_app.run.search_config import TrialConfig


def read_state(checkpoint: bytes, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `TrainingRun.state` kept. Raises ValueError if the checkpoint is damaged."""
    try:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True, map_location=device)
    except Exception as error:  # whatever the bytes lead torch's unpickler to
        raise ValueError("the checkpoint is damaged") from error
    if not (isinstance(state, dict) and isinstance(state.get("model"), dict)):
        raise ValueError("the checkpoint is damaged: it has no trained parameters")
    return state


def is_of(checkpoint: bytes, config: TrialConfig) -> bool:
    """Whether the checkpoint is from a run with exactly this config, including its changes."""
    return TrialConfig.from_dict(read_state(checkpoint)["config"]) == config
