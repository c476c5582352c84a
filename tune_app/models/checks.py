"""Checks, before anything starts, that a folder has a causal language model that can be used.

transformers fills missing weights with random numbers, and a server that misses a file looks for it
on the network. So config, weight files (their headers) and tokenizer are checked first, for both
backbones. This module imports neither torch nor transformers; checks that need them are in
`weights.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tune_app.models.folder import model_folder
from tune_app.run.typed import fits

# Where transformers looks for weights, in this order.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_checkpoint(folder: Path, mistakes: list[str]) -> int:
    """Number of the model's blocks; 0 if there are mistakes, which are appended to `mistakes`.

    Takes a few seconds for a model that is new: the names and shapes of its weights are compared
    with what transformers expects of its family.
    """
    found = check_files(folder)
    blocks = 0
    if not found:
        blocks, found = _compared(folder)
    mistakes += found
    return 0 if found else blocks


def was_checked(folder: Path) -> bool:
    """Whether this folder has passed the check before, so that checking again takes no time."""
    return _remembered(folder) > 0


def check_files(folder: Path) -> list[str]:
    """All that is wrong with the files: missing, cut short, LFS pointers, or not a model's."""
    if not folder.is_dir():
        return [f"{_at(folder)} must be a folder with config.json, weights and tokenizer."]
    if pointers := _pointers(folder):
        return [
            f"{_at(folder)} has Git LFS pointers instead of files: {', '.join(pointers)}. Run "
            "`git lfs pull` there, or download the files again."
        ]
    config, mistakes = _config(folder)
    if mistakes:
        return mistakes
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        mistakes.append(
            f"{_at(folder)} has quantized weights ({method}), which are not supported; use the "
            "model that they were made from."
        )
    try:
        for file in weight_files(folder):
            if file.suffix == ".safetensors":
                read_header(file)
    except ValueError as error:
        mistakes.append(str(error))
    return mistakes


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    file = folder / "config.json"
    if not file.is_file():
        what = "has no config.json"
        if (folder / "adapter_config.json").is_file():
            what = "is a PEFT adapter, not a model; merge it into its base model and save that"
        return {}, [f"{_at(folder)} {what}."]
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        return {}, [f"{file} is not valid JSON: {error}."]
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return {}, [f"{file} must have a model_type, such as llama or qwen3."]
    return config, []


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from. Raises ValueError if any is missing."""
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        others = [file.name for file in sorted(folder.iterdir()) if file.suffix in _OTHER_FORMATS]
        hint = f" It has {', '.join(others)}, which must be converted first." if others else ""
        raise ValueError(f"{_at(folder)} has no weights: none of {', '.join(WEIGHT_FILES)}.{hint}")
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


_OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx", ".pth", ".pt", ".ckpt")


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


def _pointers(folder: Path) -> list[str]:
    """Files for which git has fetched only a pointer (about 130 bytes)."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and _begins(file).startswith(_LFS_POINTER):
            found.append(file.name)
    return found


def _begins(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(len(_LFS_POINTER))


# -------------------------------------------------------------- checks that need transformers


def _compared(folder: Path) -> tuple[int, list[str]]:
    """(blocks, mistakes) of `weights.compare`, remembered if there are no mistakes.

    Runs in a separate process unless torch is loaded already: torch would otherwise take about
    300 MB for as long as the search runs.
    """
    if blocks := _remembered(folder):
        return blocks, []
    if "torch" in sys.modules:
        from tune_app.models.weights import compare

        blocks, mistakes = compare(folder)
    else:
        blocks, mistakes = _in_a_process(folder)
    if not mistakes:
        known = _memory(folder)
        with suppress(OSError):  # if the home cannot be written to, it takes these seconds again
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(str(blocks))
    return blocks, mistakes


def _remembered(folder: Path) -> int:
    """The blocks of a folder that has passed before; 0 otherwise.

    The demo model counts as passed (a test ensures that), so that the default command starts
    sooner.
    """
    if folder == model_folder("demo"):
        return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    with suppress(OSError, ValueError):
        return int(_memory(folder).read_text())
    return 0


def _in_a_process(folder: Path) -> tuple[int, list[str]]:
    root = str(Path(__file__).resolve().parents[2])  # works in a clone that is not installed
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tune_app.models.weights", str(folder)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return 0, [f"{_at(folder)} cannot be checked: {last}"]
    blocks, mistakes = json.loads(done.stdout.strip().rpartition("\n")[2])
    return blocks, mistakes


def _memory(folder: Path) -> Path:
    """The file that records that this folder has passed with this version of transformers."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    told = [importlib.metadata.version("transformers")]
    for file in sorted(folder.iterdir()):
        status = file.stat()
        told.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return home / "tune_app" / "models" / hashlib.sha256("\n".join(told).encode()).hexdigest()


def _at(folder: Path) -> str:
    return repr(str(folder))
