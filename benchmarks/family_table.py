"""Compares every family with transformers' whole models and writes docs/families.md.

    python -m benchmarks.family_table [--device cuda]

Tiny random models of all families, two real Petals servers on 127.0.0.1; about two minutes. Run it
after each change of transformers' version. Exit code 1 where a family differs.

With a device, the models in process are on it, the servers on a GPU if there is one, and the page
is not written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
import transformers

from tests.served_families import all_served, clients
from tests.tiny_models import FAMILIES, write_tiny_model
from tests.whole_models import differences, generation_difference
from tune_app.backbones.local import LocalBackbone

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
ALIKE = {"float32": 2e-5, "bfloat16": 0.01}
_VOCAB = 64
_MODELS = {
    "llama": "Llama 1 and 2, SmolLM2, Vicuna, ...",
    "llama-gqa": "the same, with fewer key-value heads: Llama 2 70B, TinyLlama",
    "llama-3.1": "Llama 3.1, its config as transformers 5 writes it",
    "llama-3.1-hub": "Llama 3.1, its config as on the hub",
    "llama-3.2": "Llama 3.2: tied embeddings",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2-sliding": "the same, with sliding windows",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3 with experts",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4-mini",
    "bloom": "BLOOM, as on the hub",
    "bloom-with-head": "BLOOM, saved with its head",
    "falcon": "Falcon 40B, Falcon 2",
    "falcon-7b": "Falcon 7B",
    "falcon-alibi": "Falcon RW",
    "gpt-neox": "GPT-NeoX, Pythia",
    "gpt2": "GPT-2",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "cohere2": "Command R7B",
    "starcoder2": "StarCoder 2",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", help="of the models in process; without it, cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folders = {
            family: write_tiny_model(family, Path(root) / family, vocab=_VOCAB)
            for family in FAMILIES
        }
        with all_served(folders) as peers, clients(folders, peers) as client:
            rows = {}
            for family, folder in folders.items():
                rows[family] = dict(_row(family, folder, client, device or "cpu"))
                print(family, *(f"{name} {value:.0e}" for name, value in rows[family].items()))
    if device is None:
        PAGE.write_text(_page(rows))
        print(f"written: {PAGE}")
    wrong = [
        f"{family}, {name}: {value:.1e}"
        for family, row in rows.items()
        for name, value in row.items()
        if not value <= ALIKE["bfloat16" if "bfloat16" in name else "float32"]
    ]
    for text in wrong:
        print(f"DIFFERENT: {text}")
    return 1 if wrong else 0


def _row(family: str, folder: Path, client: Any, device: str) -> Iterator[tuple[str, float]]:
    local = {
        dtype: LocalBackbone(folder, device=device, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    }
    yield "local", differences(folder, local["float32"]).largest
    yield "server", differences(folder, client(family, "one")).largest
    yield "chain", differences(folder, client(family, "chain")).largest
    yield "generation, local", generation_difference(folder, local["float32"])
    yield "generation, chain", generation_difference(folder, client(family, "chain"))
    yield "bfloat16, local", differences(folder, local["bfloat16"]).largest
    yield "bfloat16, server", differences(folder, client(family, "half")).largest


def _page(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [
        f"| family | models | {' | '.join(columns)} |",
        f"| --- | --- |{' ---: |' * len(columns)}",
    ]
    for family, row in rows.items():
        cells = ["0" if value == 0 else f"{value:.0e}" for value in row.values()]
        lines.append(f"| {family} | {_MODELS[family]} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""\
# Families

Written by `python -m benchmarks.family_table` with transformers {transformers.__version__} and \
torch {torch.__version__.partition("+")[0]};
do not edit.

Each family was compared with transformers' whole model: hidden states, logits, and the gradients of
prompts and deep prompts, on padded rows, with a small random model. A cell is the largest
difference of any of these numbers, as a part of the largest of its kind: in process (local), on a
Petals server, and on a chain of two servers, in float32 and in bfloat16. Generation is a text that
grows token by token over kept keys and values, with deep prompts, compared with passes over the
whole text. Tests compare them again, with the rows of several trials in one pack and with score
heads.

{table}

## Other families

A model of another type is compared in the same way, on a few tokens of its own weights, when its
folder is first used: in process and block by block, as servers run it. That takes some seconds, and
up to twice two gigabytes of memory; of a larger model the first block is compared. The result is
kept in `~/.cache/tune_app/families` for this version of transformers. Where numbers differ, the
model is refused, with what differs.

Refused, too, with the reason:

- OPT and multimodal models (Gemma 3 with images): their blocks are not a list in the model's base,
  but deeper inside.
- Encoders and encoder-decoder models: they have no causal language model.
- Models that come with Python code of their own: it is never run.
"""


if __name__ == "__main__":
    sys.exit(main())
