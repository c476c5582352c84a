"""Which families were compared with transformers' whole models, and the comparison of any other.

benchmarks/family_table.py compares those of the table in every way, real servers included. A model
of another type is compared on a few tokens when its folder is first used. Gradients are compared
too, because they may differ even if outputs are equal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import transformers

from tune_app.models.load_parts import (
    blocks_of,
    load_blocks,
    load_ends,
    load_first_block,
    load_whole,
)
from tune_app.models.parts import Block, Ends, Whole, with_deep_prompt
from tune_app.run.search_config import ConfigError

# The model types of docs/families.md.
TRIED = frozenset(
    {
        "bloom",
        "cohere2",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
# If the weight files are larger, only the first block is compared.
_WHOLE_BYTES = 2 * 2**30
# Relative to the largest number; summing in another order gives 1e-6.
_TOLERANCE = 1e-4
_TOKENS, _PROMPT = 12, 3

# (word embeddings [B, S, H], deep prompts [L, B, P, H]) -> (hidden states, logits)
Run = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def check_family(folder: Path) -> None:
    """Raises ConfigError if prompts for a model of the folder's type would be trained wrongly.

    Nothing is computed for a family of the table, or one that has passed before with this version
    of transformers (noted in the user's cache folder). Otherwise loads up to two gigabytes of
    weights, in float32.
    """
    family = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    note = _note(family)
    if family in TRIED or note.is_file():
        return
    apart = differences(folder)
    wrong = [f"{name} by {ratio:.1e}" for name, ratio in apart.items() if not ratio <= _TOLERANCE]
    if wrong:
        raise ConfigError(
            f"models of type {family!r} are not supported: on a few tokens, results differ from "
            f"those of transformers' whole model (relative to the largest): {', '.join(wrong)}. "
            "docs/families.md lists the families that are supported."
        )
    with suppress(OSError):  # if the home cannot be written to, it takes these seconds again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"largest difference {max(apart.values()):.1e}\n")


def _note(family: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tune_app" / "families" / f"{family}, transformers {transformers.__version__}"


def differences(folder: Path) -> dict[str, float]:
    """By name, the largest difference from the whole model, relative to the largest number.

    The model's own forward is compared with the model as it runs in this process, and with the
    model run block by block, as on servers.
    """
    size = sum(f.stat().st_size for f in [*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    load = load_whole if size <= _WHOLE_BYTES else load_first_block
    plain, model = load(folder, torch.float32), load(folder, torch.float32)
    count, words = len(blocks_of(plain)), plain.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(words), (2, _TOKENS), generator=generator)
    deep_LBPH = torch.randn(count, 2, _PROMPT, words.shape[1], generator=generator) * words.std()
    weight = torch.randn(2, _TOKENS, len(words), generator=generator)

    def numbers(run: Run) -> dict[str, torch.Tensor]:
        inputs = [words[tokens].clone().requires_grad_(), deep_LBPH.clone().requires_grad_()]
        hidden_BSH, logits = run(*inputs)
        grads = torch.autograd.grad((logits.log_softmax(-1) * weight).sum(), inputs)
        names = ("hidden states", "logits", "gradients of prompts", "gradients of deep prompts")
        return dict(zip(names, (hidden_BSH, logits, *grads), strict=True))

    expected = numbers(partial(_own_forward, plain))
    found: dict[str, float] = {}
    ways = {
        "in process": _in_process(model),
        "on a server": _block_by_block(load_ends(folder, torch.float32), folder, count),
    }
    for way, run in ways.items():
        for name, ours in numbers(run).items():
            theirs = expected[name]
            found[f"{name} {way}"] = float(
                ((ours - theirs).abs().max() / theirs.abs().max()).detach()
            )
    return found


def _own_forward(
    model: transformers.PreTrainedModel, embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """With nothing but the family's own code, apart from deep prompts."""
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, deep=deep_BPH: (with_deep_prompt(args[0], deep), *args[1:])
        )
        for block, deep_BPH in zip(blocks_of(model), deep_LBPH, strict=True)
    ]
    try:
        hidden_BSH = model.base_model(inputs_embeds=embeds_BSH, use_cache=False).last_hidden_state
        return hidden_BSH, model(inputs_embeds=embeds_BSH, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def _in_process(model: transformers.PreTrainedModel) -> Run:
    whole = Whole(model)

    def run(embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BSH = whole(embeds_BSH, deep_LBPH)
        return hidden_BSH, whole.head(hidden_BSH)

    return run


def _block_by_block(model: transformers.PreTrainedModel, folder: Path, count: int) -> Run:
    ends = Ends(model)
    blocks = [Block(load_blocks(folder, [i], torch.float32), i) for i in range(count)]

    def run(embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def chain(hidden_BSH: torch.Tensor) -> torch.Tensor:
            for block, deep_BPH in zip(blocks, deep_LBPH, strict=True):
                hidden_BSH = block(with_deep_prompt(hidden_BSH, deep_BPH))
            return hidden_BSH

        hidden_BSH = ends(embeds_BSH, chain)
        return hidden_BSH, ends.head(hidden_BSH)

    return run
