"""Which model prompts were trained with, so that they are not used with another one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_app.models.folder import commit_of, is_local

# Entries of config.json that say nothing about the weights.
_INCIDENTAL = ("_name_or_path", "architectures", "torch_dtype", "transformers_version", "use_cache")
_ENDS_BYTES = 2**20  # of each weight file that its fingerprint reads, at either end


@dataclass(frozen=True)
class ModelIdentity:
    """A model as its folder describes it; names are those of `--model`."""

    name: str
    family: str  # model_type: llama, bloom, falcon, …
    revision: str | None  # the commit, where the model comes from a hub
    hidden_size: int
    num_blocks: int
    config_sha256: str  # over what config.json says of the weights
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
            # BLOOM's and Falcon's older files have names of their own
            hidden_size=int(config.get("hidden_size") or config.get("n_embed") or 0),
            num_blocks=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
            config_sha256=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
            weights_fingerprint=_weights_fingerprint(folder),
        )

    def refusal(self, other: ModelIdentity) -> str | None:
        """Why prompts trained with this model do not fit the other one; None where they do."""
        if self.config_sha256 == other.config_sha256:
            return None
        mine, others = self._shape(), other._shape()
        if mine == others:
            mine, others = "another config.json", "one that differs in other entries"
        return (
            f"--model: these prompts were trained with {self.name!r} ({mine}) and fit no other "
            f"model; {other.name!r} has {others}."
        )

    def _shape(self) -> str:
        return f"{self.family}, hidden size {self.hidden_size}, {self.num_blocks} blocks"


def _weights_fingerprint(folder: Path) -> str:
    """Different for another training of the same model, without reading gigabytes."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_ENDS_BYTES))
            content.seek(max(0, size - _ENDS_BYTES))
            digest.update(content.read())
    return digest.hexdigest()
