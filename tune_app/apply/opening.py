"""Which prompts a caller means, and the settings that open them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_app.apply.export import export_best
from tune_app.apply.prompts_folder import ABOUT, About
from tune_app.models.folder import model_folder
from tune_app.models.identity import ModelIdentity
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import DATA, ConfigError, SearchConfig, settings_under


def find_prompts(path: str | Path) -> Path:
    """The folder of prompts at `path`: itself, or that of a run, exported now if need be.

    Raises ConfigError if there is none.
    """
    run = RunDir(path)
    if (run.path / ABOUT).is_file():
        return run.path
    if run.prompts_json.is_file():
        return run.prompts
    if not run.events_jsonl.is_file():
        raise ConfigError(
            f"{str(path)!r}: neither a run (no {run.events_jsonl.name}) nor a folder of prompts "
            f"(no {ABOUT})."
        )
    prompts = export_best(run)  # the search was killed before it did
    if prompts is None:
        raise ConfigError(
            f"{str(path)!r}: no prompts yet, because none of its trials has finished."
        )
    return prompts


def opening_config(
    about: About,
    *,
    model: str | None = None,
    revision: str | None = None,
    backbone: str | None = None,
    peers: Sequence[str] = (),
    device: str | None = None,
    own_data: bool = False,
) -> SearchConfig:
    """The search's settings, changed by what is given.

    own_data: keep the search's data, for its own test split
    """
    config = about.search_config()
    if not own_data:
        unset: dict[str, Any] = dict.fromkeys(settings_under(DATA))
        config = replace(config, **unset)
    if backbone == "local":
        config = replace(config, peers=())
    elif peers:
        config = replace(config, backbone="swarm", peers=tuple(peers))
    if model is not None or revision is not None:
        config = replace(config, revision=revision)
    given: dict[str, Any] = {"model": model, "backbone": backbone, "device": device}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def check_model(about: About, config: SearchConfig) -> bool:
    """Whether the config's model has the very weight files that the prompts were trained with.

    Raises ConfigError if the prompts do not fit the model.
    """
    folder = model_folder(config.model, config.revision)
    here = ModelIdentity.of(config.model, folder, config.revision)
    if refusal := about.model.refusal(here):
        raise ConfigError(refusal)
    return here.weights_fingerprint == about.model.weights_fingerprint
