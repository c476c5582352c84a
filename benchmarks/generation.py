"""What a kept cache saves where tuned prompts continue a text.

    python -m benchmarks.generation [--model FOLDER] [--dtype bfloat16] [--text-tokens 200]

Continues one text by 64 tokens, greedily, with and without kept keys and values, on the local
backbone and on a private swarm of one server, in turns. Without a cache every token takes a pass
over the whole text, so the longer it is, the more is saved; the quotient is of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import describe
from tune_app.apply.generation import chooser, continuation
from tune_app.apply.logits import next_token_logits
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.backbones.protocol import Backbone
from tune_app.models.folder import model_folder
from tune_app.run.search_config import TrialConfig
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm
from tune_app.tasks.known import task_named
from tune_app.train.prompt_model import PromptTunedModel

PROMPT, NEW = 8, 64


def with_cache(model: PromptTunedModel, text: list[int]) -> list[int]:
    return list(continuation(model, text, NEW, chooser(None)))


def without_cache(model: PromptTunedModel, text: list[int]) -> list[int]:
    tokens, choose = list(text), chooser(None)
    for _ in range(NEW):
        tokens.append(choose(next_token_logits(model, tokens)))
    return tokens[len(text) :]


def measure(name: str, backbone: Backbone, text: list[int], repeats: int) -> None:
    """Prints the medians, and whether both gave the same tokens."""
    config = TrialConfig(prompt_length=PROMPT)
    run = partial(run_alone, backbone)
    model = PromptTunedModel(backbone, run, task_named("causal-lm"), 0, config)
    ways: dict[str, Callable[..., list[int]]] = {"with": with_cache, "without": without_cache}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens = {}
    for _ in range(repeats):
        for way, generate in ways.items():
            began = time.perf_counter()
            tokens[way] = generate(model, text)
            seconds[way].append(time.perf_counter() - began)
    kept, whole = (statistics.median(seconds[way]) for way in ways)
    same = "the same tokens" if tokens["with"] == tokens["without"] else "other tokens (rounding)"
    print(f"{name:6} {kept:6.2f} s with, {whole:6.2f} s without: {kept / whole:.3f}, {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, or a folder (default: demo)")
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--text-tokens", type=int, default=200, help="before the continuation")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder: Path = model_folder(options.model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 2000, (options.text_tokens,), generator=generator).tolist()
    print(f"{options.model}, {options.dtype}, {options.text_tokens} + {NEW} tokens")
    for key, value in describe().items():
        print(f"  {key}: {value}")
    local = LocalBackbone(folder, device="cpu", dtype=options.dtype)
    measure("local", local, text, options.repeats)
    del local
    from tune_app.backbones.swarm import SwarmBackbone

    with private_swarm(ServeConfig(folder, dtype=options.dtype)) as swarm:
        backbone = SwarmBackbone(
            folder, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype=options.dtype
        )
        measure("swarm", backbone, text, options.repeats)
        backbone.close()


if __name__ == "__main__":
    main()
