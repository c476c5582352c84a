"""Where a model's files are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tune_app.run.paths import user_path
from tune_app.run.search_config import ConfigError

_DEMO = Path(__file__).parent / "demo" / "model"


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of `--model`: the demo's, a local one, or a hub model's (downloaded if needed).

    revision: branch, tag or commit of a hub model; None: its main branch.
    Raises ConfigError if there is no such model, or the hub does not provide it.
    """
    if revision is not None and is_local(model):
        raise ConfigError(f"--revision: only for a model on a hub, got --model {model!r}.")
    if model == "demo":
        return _DEMO
    if is_local(model):
        return user_path(model).resolve()
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"--model: there is no folder {model!r}.")
    from tune_app.models.hub import fetched  # its imports take half a second

    return fetched(model, revision)


def commit_of(model: str, revision: str | None) -> str:
    """The commit of a hub model that `model_folder` has downloaded."""
    from tune_app.models import hub

    return hub.commit_of(model, revision)


def is_local(model: str) -> bool:
    """Whether `--model` is the demo or a local folder, and not the name of a model on a hub."""
    return model == "demo" or os.path.isdir(user_path(model))


def positions(folder: Path) -> int | None:
    """The most positions (prompt and text) that the model's config allows; None if unlimited.

    BLOOM and Falcon's alibi variants have no table of positions.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "bloom" or config.get("alibi"):
        return None
    value = config.get("max_position_embeddings")
    return int(value) if value else None


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a text according to the model's generation_config.json, if it has one."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return set()
    ends = json.loads(file.read_text("utf-8")).get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends} - {None}
