"""What a checkpoint holds: torch's archive of `TrainingRun.state`, and in it the trained parameters
once more, as safetensors, so that a search exports them without importing torch (1.3 s).

Apart from the loop, which imports transformers.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load, save

from tune_app.run.search_config import TrialConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

_WEIGHTS = "archive/weights.safetensors"  # torch reads the entries that it knows


def pack(state: Mapping[str, Any]) -> bytes:
    """A checkpoint of `state`, whose "model" has the trained parameters."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    weights = {name: value.detach().cpu().numpy() for name, value in state["model"].items()}
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(_WEIGHTS, save(weights))
    return buffer.getvalue()


def read_state(checkpoint: bytes, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What was packed. Raises ValueError if the checkpoint is damaged."""
    import torch

    try:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True, map_location=device)
    except Exception as error:  # whatever the bytes lead torch's unpickler to
        raise ValueError("the checkpoint is damaged") from error
    if not (isinstance(state, dict) and isinstance(state.get("model"), dict)):
        raise ValueError("the checkpoint is damaged: it has no trained parameters")
    return state


def read_weights(checkpoint: bytes) -> dict[str, np.ndarray]:
    """The trained parameters. Raises ValueError if the checkpoint is damaged.

    Imports torch only for a checkpoint of an earlier version, which has them in the state alone.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
            if _WEIGHTS in archive.namelist():
                if archive.getinfo(_WEIGHTS).compress_type != zipfile.ZIP_STORED:
                    raise ValueError("packed by somebody else")  # and may unpack without end
                return load(archive.read(_WEIGHTS))
    except Exception as error:  # whatever the bytes lead zipfile and safetensors to
        raise ValueError("the checkpoint is damaged") from error
    state = read_state(checkpoint)
    return {name: value.numpy() for name, value in state["model"].items()}


def is_of(checkpoint: bytes, config: TrialConfig) -> bool:
    """Whether the checkpoint is from a run with exactly this config, including its changes."""
    return TrialConfig.from_dict(read_state(checkpoint)["config"]) == config
