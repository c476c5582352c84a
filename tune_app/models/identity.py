"""Identifies the model that prompts were trained with, so that they are not used with another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_app.models.folder import commit_of, is_local

# Entries of config.json that have nothing to do with the weights.
_INCIDENTAL = ("_name_or_path", "architectures", "torch_dtype", "transformers_version", "use_cache")
_ENDS_BYTES = 2**20  # the fingerprint reads this much at either end of each weight file


@dataclass(frozen=True)
class ModelIdentity:
    """A model as its folder describes it; `name` is as in `--model`."""

    name: str
    family: str  # model_type: llama, bloom, falcon, …
    revision: str | None  # the commit, if the model comes from a hub
    hidden_size: int
    num_blocks: int
    config_sha256: str  # over the entries of config.json that concern the weights
    weights_fingerprint: str  # over names, sizes and both ends of the weight files

    @classmethod
    def of(cls, name: str, folder: Path, revision: str | None = None) -> ModelIdentity:
        """The identity of the model in `folder`, which is `model_folder(name, revision)`."""
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        told = {key: value for key, value in config.items() if key not in _INCIDENTAL}
        return cls(
            name=name,
            family=str(config.get("model_type")),
            revision=None if is_local(name) else commit_of(name, revision),
            # older files of BLOOM and Falcon use other names
            hidden_size=int(config.get("hidden_size") or config.get("n_embed") or 0),
            num_blocks=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
            config_sha256=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
            weights_fingerprint=_weights_fingerprint(folder),
        )

    def refusal(self, other: ModelIdentity) -> str | None:
        """Why prompts trained with this model do not fit the other one; None if they do."""
        if self.config_sha256 == other.config_sha256:
            return None
        mine, others = self._shape(), other._shape()
        if mine == others:
            mine, others = "another config.json", "the same sizes, but other entries differ"
        return (
            f"--model: these prompts were trained with {self.name!r} ({mine}) and fit no other "
            f"model, got {other.name!r} ({others})."
        )

    def _shape(self) -> str:
        return f"{self.family}, hidden size {self.hidden_size}, {self.num_blocks} blocks"


def _weights_fingerprint(folder: Path) -> str:
    """Differs if the same model was trained again, without reading gigabytes."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS_BYTES))
            content.seek(max(0, size - _ENDS_BYTES))
            digest.update(content.read())
    return digest.hexdigest()
