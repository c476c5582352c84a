"""Tuned prompts on disk: a folder that says what it contains and which model it fits.

    prompts.safetensors   the weights, named and shaped as in prompt_model.py and in Petals' classes
    prompts.json          `About`: what they were trained for and with, and how good they are
    README.md             model_card.py: the same for people and hubs, and how to use it elsewhere
    adapter_*             peft_adapter.py: the same weights for PEFT (ptune)

Imports torch only to read weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.numpy import save

from tune_app.apply.model_card import model_card
from tune_app.apply.peft_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_files
from tune_app.models.folder import is_local
from tune_app.models.identity import ModelIdentity
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.run.typed import convert_fields, well_typed
from tune_app.tasks.base import Scale
from tune_app.tasks.known import TASKS

if TYPE_CHECKING:
    import numpy as np
    import torch

_Record = TypeVar("_Record")
WEIGHTS, ABOUT, CARD = "prompts.safetensors", "prompts.json", "README.md"


@dataclass(frozen=True)
class About:
    """The content of prompts.json, except for the checksum of the weights."""

    model: ModelIdentity
    task: str
    class_names: tuple[str, ...]  # by class index; empty if labels are not classes
    max_length: int  # most tokens of text in a row, without the prompt
    trial: int  # the trial with this config
    trained_as: int  # the trial or confirmation run that trained these weights
    config: TrialConfig
    metrics: dict[str, dict[str, float]]  # of these weights, on "valid" and, if known, "test"
    search: dict[str, Any]  # the settings of SearchConfig that concern data and backbone
    data_fingerprint: str
    tune_app: str  # version
    scale: Scale | None = None  # of labels that are numbers
    answer: str = ""  # of the search, as its report states it

    def search_config(self) -> SearchConfig:
        """The settings of the search that concern the model and its data.

        Raises ConfigError if this version does not know them.
        """
        values, messages = convert_fields(SearchConfig, self.search)
        if messages:
            raise ConfigError([f"{ABOUT}: {message}" for message in messages])
        return SearchConfig(
            task=self.task,
            model=self.model.name,
            revision=None if is_local(self.model.name) else self.model.revision,
            max_length=self.max_length,
            **values,
        )


def write_prompts(folder: Path, weights: Mapping[str, np.ndarray], about: About) -> Path:
    """Writes the folder; prompts.json last, so that a kill leaves nothing that looks complete."""
    flat = {
        "model": about.model.name,
        "revision": about.model.revision or "",
        "model_config_sha256": about.model.config_sha256,
        "task": about.task,
        "tuning_mode": about.config.tuning_mode,
        "prompt_length": str(about.config.prompt_length),
        "class_names": json.dumps(about.class_names),
        "config": json.dumps(about.config.to_dict()),
        "metrics": json.dumps(about.metrics),
        "data_fingerprint": about.data_fingerprint,
        "tune_app": about.tune_app,
    }
    content = save(dict(weights), metadata=flat)
    files = RunDir(folder)
    files.write_atomic(WEIGHTS, content)
    files.write_atomic(CARD, model_card(about))
    adapter = adapter_files(weights, about)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if name in adapter:
            files.write_atomic(name, adapter[name])
        else:  # may be left from earlier prompts
            (folder / name).unlink(missing_ok=True)
    document = asdict(about) | {
        "config": about.config.to_dict(),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    files.write_atomic(ABOUT, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return folder


def read_about(folder: Path) -> About:
    """What the folder contains. Raises ConfigError if it is not a complete folder of prompts."""
    try:
        document = json.loads((folder / ABOUT).read_text("utf-8"))
        content = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: there are no prompts in it ({Path(error.filename).name} is missing)."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its prompts cannot be read: {error}.") from None
    try:
        if document.pop("weights_sha256") != hashlib.sha256(content).hexdigest():
            raise ConfigError(
                f"{folder}: {WEIGHTS} does not belong to {ABOUT}; copy the whole folder, or export "
                "the prompts again."
            )
        document["model"] = _record(ModelIdentity, document["model"])
        document["config"] = TrialConfig.from_dict(document["config"])
        document["class_names"] = tuple(document["class_names"])
        if document.get("scale") is not None:
            document["scale"] = _record(Scale, document["scale"])
        if document["task"] not in TASKS:
            raise TypeError(f"task is {document['task']!r}")
        return _record(About, document)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error)[:300]
        raise ConfigError(f"{folder / ABOUT}: was not written by tune_app: {reason}.") from None


def _record(cls: type[_Record], values: Mapping[str, Any]) -> _Record:
    """Raises TypeError if a value has another type than its field."""
    odd = values.keys() - well_typed(cls, values).keys()
    if odd:
        raise TypeError(", ".join(f"{name} is {values[name]!r}" for name in sorted(odd)))
    return cls(**values)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights by their names in `PromptTunedModel`, on the CPU.

    Raises ConfigError where they cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: cannot be read: {error}.") from None
    return weights
