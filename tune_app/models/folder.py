"""Where a model's files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune_app.run.search_config import ConfigError

_DEMO = Path(__file__).parent / "demo" / "model"


def model_folder(model: str) -> Path:
    """The folder of `--model`: the demo's, a local one, or a hub's (fetched, where it is not yet).

    Raises ConfigError where the hub does not have it or does not answer.
    """
    if model == "demo":
        return _DEMO
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser().resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
        )
    except Exception as error:  # the hub's client raises many unrelated types
        raise ConfigError(f"--model: cannot fetch {model!r} from the hub: {error}") from error


def is_hub_name(model: str) -> bool:
    """Whether `--model` names a model on a hub, and neither the demo's nor a folder here."""
    return model != "demo" and not Path(model).expanduser().is_dir()


def positions(folder: Path) -> int | None:
    """The most positions (prompt and text) that the model's config allows; None where unlimited.

    BLOOM and Falcon's alibi variants have no table of positions.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "bloom" or config.get("alibi"):
        return None
    value = config.get("max_position_embeddings")
    return int(value) if value else None
