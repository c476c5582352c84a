"""Where a model's files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune_app.run.search_config import ConfigError

_DEMO = Path(__file__).parent / "demo" / "model"


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of `--model`: the demo's, a local one, or a hub's (fetched, where it is not yet).

    revision: branch, tag or commit of a hub's model; None: its main branch.
    Raises ConfigError where there is none, or the hub does not give it.
    """
    if revision is not None and is_local(model):
        raise ConfigError(f"--revision: is for a model on a hub, and {model!r} is none.")
    if model == "demo":
        return _DEMO
    if is_local(model):
        return Path(model).expanduser().resolve()
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"--model: there is no folder {model!r}.")
    from tune_app.models.hub import fetched  # what it imports takes half a second

    return fetched(model, revision)


def commit_of(model: str, revision: str | None) -> str:
    """The commit of a hub's model that `model_folder` has fetched."""
    from tune_app.models import hub

    return hub.commit_of(model, revision)


def is_local(model: str) -> bool:
    """Whether `--model` names no hub's model: the demo or a folder."""
    return model == "demo" or Path(model).expanduser().is_dir()


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


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a text by the model's generation_config.json, where it has one."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return set()
    ends = json.loads(file.read_text("utf-8")).get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends} - {None}
