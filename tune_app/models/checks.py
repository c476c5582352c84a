"""What Petals 2.2 needs to find in a model's folder, checked without torch or petals.

A server that misses a weight file goes looking for it on the network, and for ever; so the files
are read up to their headers before one is started.
"""

from __future__ import annotations

import json
from pathlib import Path

from tune_app.run.search_config import did_you_mean

# Where Petals 2.2 looks for the blocks in a checkpoint, by model_type.
_BLOCK_PREFIX = {"llama": "model.layers", "bloom": "h", "falcon": "transformer.h"}
_INDEX_FILES = (  # in Petals' order
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def check_checkpoint(folder: Path, mistakes: list[str]) -> int:
    """Number of blocks; 0 with a mistake appended if the folder cannot be served."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        mistakes.append(
            f"a private swarm serves a model from a local folder, but {str(folder)!r} {what}."
        )
        return 0
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        mistakes.append(f"{folder / 'config.json'} is not valid JSON: {error}.")
        return 0
    family = config.get("model_type")
    if family not in _BLOCK_PREFIX:
        mistakes.append(
            f"Petals serves the model types {', '.join(_BLOCK_PREFIX)}; {str(folder)!r} is of type "
            f"{family!r}.{did_you_mean(family, _BLOCK_PREFIX)} Other models: --backbone local."
        )
        return 0
    index = next((folder / name for name in _INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        mistakes.append(f"{str(folder)!r} has no weights: none of {', '.join(_INDEX_FILES)}.")
        return 0
    try:
        names = _weight_names(index)
    except (ValueError, KeyError) as error:
        mistakes.append(f"{index} cannot be read as weights: {error}.")
        return 0
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    prefix = _BLOCK_PREFIX[family]
    if names is not None and not any(name.startswith(f"{prefix}.0.") for name in names):
        hint = ""
        if any(name.startswith("transformer.h.") for name in names):
            hint = (
                " It was saved from BloomForCausalLM; save its headless part instead: "
                "BloomForCausalLM.from_pretrained(FOLDER).transformer.save_pretrained(NEW_FOLDER)."
            )
        mistakes.append(
            f"Petals looks for a {family} model's blocks under {prefix}.0, {prefix}.1, … but the "
            f"weights in {str(folder)!r} have none there.{hint}"
        )
        return 0
    return layers


def _weight_names(index: Path) -> list[str] | None:
    """Names of the tensors; None where only torch could tell. ValueError if the file is damaged."""
    if index.suffix == ".json":
        return list(json.loads(index.read_text())["weight_map"])
    if index.suffix != ".safetensors":
        return None
    with index.open("rb") as file:  # 8 bytes: length of the JSON header that follows
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > index.stat().st_size:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    data_bytes = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if index.stat().st_size != 8 + header_bytes + data_bytes:
        raise ValueError("the file is cut short")  # Petals would try to download it, for ever
    return list(header)
