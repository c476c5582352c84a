"""The weight files in a model's folder: which ones there are, and the shapes in their headers.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

from tune_app.run.typed import fits

# Where transformers looks for weights, in this order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx", ".pth", ".pt", ".ckpt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from. Raises ValueError if any is missing."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        others = [file.name for file in sorted(folder.iterdir()) if file.suffix in _OTHER_FORMATS]
        hint = f" It has {', '.join(others)}, which must be converted first." if others else ""
        raise ValueError(
            f"{str(folder)!r} has no weights: none of {', '.join(WEIGHT_FILES)}.{hint}"
        )
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(json.loads(first.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{first} is not a list of weights: {error!r}.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{first} lists {len(names)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors. Raises ValueError if it is damaged or cut
    short."""
    size = file.stat().st_size
    with file.open("rb") as content:  # 8 bytes: length of the JSON header that follows
        length = int.from_bytes(content.read(8), "little")
        try:
            if length > size:
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            offsets = [tuple(tensor["data_offsets"]) for tensor in header.values()]
            shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
            if not all(fits(numbers, tuple[int, ...]) for numbers in (*offsets, *shapes.values())):
                raise ValueError("its header has shapes or offsets that are no whole numbers")
            ends = [end for _, end in offsets]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}.") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ValueError(
            f"{file} is cut short: it has {size:,} bytes, but should have {whole:,}. Copy or "
            "download it again."
        )
    return shapes


def pointers(folder: Path) -> list[str]:
    """Files for which git has fetched only a pointer (about 130 bytes)."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and _begins(file).startswith(_LFS_POINTER):
            found.append(file.name)
    return found


def _begins(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(len(_LFS_POINTER))
