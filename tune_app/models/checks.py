"""What a server needs to find in a model's folder, checked without torch or petals.

The files are read up to their headers before a server is started.
"""

from __future__ import annotations

import json
from pathlib import Path

_INDEX_FILES = (  # in the order of transformers
    "model.safetensors",
    "model.safetensors.index.json",
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
    index = next((folder / name for name in _INDEX_FILES if (folder / name).is_file()), None)
    if index is None:
        mistakes.append(f"{str(folder)!r} has no weights: none of {', '.join(_INDEX_FILES)}.")
        return 0
    try:
        _weight_names(index)
    except (ValueError, KeyError) as error:
        mistakes.append(f"{index} cannot be read as weights: {error}.")
        return 0
    return int(config.get("num_hidden_layers") or config.get("n_layer") or 0)


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
