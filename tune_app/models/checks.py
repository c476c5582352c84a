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
from tune_app.models.weight_files import pointers, read_header, weight_files


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
    if found := pointers(folder):
        return [
            f"{_at(folder)} has Git LFS pointers instead of files: {', '.join(found)}. Run "
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
