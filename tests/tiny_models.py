"""Random models of a few kilobytes, for tests.

Not for quality: deterministic weights, drawn wide enough that two layers or two tokens never look
alike, in the layout of the published checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

# "llama-gqa" has 2 queries a key-value head; "falcon" is the new decoder architecture (40b),
# "falcon-7b" the older one with a single key-value head and no second layer norm.
FAMILIES = ("llama", "llama-gqa", "bloom", "falcon", "falcon-7b")

_DEMO_MODEL = Path(__file__).parents[1] / "tune_app" / "models" / "demo" / "model"
_DEMO_VOCAB = 2048
_HEADS = 4


def write_tiny_model(
    family: str,
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = _DEMO_VOCAB,
    seed: int = 0,
) -> Path:
    """Writes config, safetensors and the demo tokenizer to `folder`; returns the folder.

    `family` is one of FAMILIES; `hidden` a multiple of 8 (4 heads of even size). The same arguments
    give the same bytes. A `vocab` below the tokenizer's leaves its higher ids without an embedding.
    """
    config, model_class = _blueprint(family, layers, hidden, vocab)
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        config.initializer_range = 0.2
        model = model_class(config).eval()
    # BLOOM's published checkpoints hold the headless model (keys `h.…`).
    stored = model.transformer if family == "bloom" else model
    stored.save_pretrained(folder)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(_DEMO_MODEL / name, folder / name)
    return folder


def _blueprint(
    family: str, layers: int, hidden: int, vocab: int
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    common = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "bos_token_id": 1,  # as in the demo tokenizer
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    match family:
        case "llama" | "llama-gqa":
            return LlamaConfig(
                num_hidden_layers=layers,
                num_attention_heads=_HEADS,
                num_key_value_heads=_HEADS // 2 if family == "llama-gqa" else _HEADS,
                intermediate_size=2 * hidden,
                max_position_embeddings=256,
                **common,
            ), LlamaForCausalLM
        case "bloom":
            return BloomConfig(n_layer=layers, n_head=_HEADS, **common), BloomForCausalLM
        case "falcon" | "falcon-7b":
            new = family == "falcon"
            return FalconConfig(
                num_hidden_layers=layers,
                num_attention_heads=_HEADS,
                num_kv_heads=_HEADS // 2 if new else 1,
                new_decoder_architecture=new,
                multi_query=not new,
                parallel_attn=True,
                bias=False,
                alibi=False,
                **common,
            ), FalconForCausalLM
    raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
