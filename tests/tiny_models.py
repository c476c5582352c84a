"""Random models of a few kilobytes, of every supported family, for tests.

Not for quality: deterministic weights, drawn wide enough that two layers or two tokens never look
alike, in the layout of the published checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

_DEMO_MODEL = Path(__file__).parents[1] / "tune_app" / "models" / "demo" / "model"
_DEMO_VOCAB = 2048
_HEADS = 4

# From layers, hidden size and vocabulary.
MakeConfig = Callable[[int, int, int], hf.PretrainedConfig]


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
    give the same bytes. With a `vocab` below the tokenizer's its higher ids are cut off.
    """
    config = (_CONFIGS | _REFUSED)[family](layers, hidden, vocab)
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        config.initializer_range = 0.2
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter.data += 0.1 * torch.randn(parameter.shape)
    # BLOOM's published checkpoints hold the headless model (keys `h.…`).
    stored = model.transformer if family == "bloom" else model
    stored.save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if family == "llama-3.1-hub":
        _write_as_on_the_hub(folder / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(_DEMO_MODEL / name, folder / name)
    if vocab < _DEMO_VOCAB:
        _cut_tokenizer(folder / "tokenizer.json", vocab)
    return folder


def _cut_tokenizer(tokenizer_json: Path, vocab: int) -> None:
    tokenizer = json.loads(tokenizer_json.read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < vocab}
    model["merges"] = [pair for pair in model["merges"] if pair.replace(" ", "") in model["vocab"]]
    tokenizer_json.write_text(json.dumps(tokenizer))


def _write_as_on_the_hub(config_json: Path) -> None:
    """The layout of Llama 3.1's published config.json, which is older than transformers 5."""
    config = json.loads(config_json.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["torch_dtype"] = config.pop("dtype")
    config_json.write_text(json.dumps(config, indent=2))


def _common(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "bos_token_id": 1,  # as in the demo tokenizer
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _recent(config: Any, **special: Any) -> MakeConfig:
    """Of a family whose config has the entries of Llama's."""

    def make(layers: int, hidden: int, vocab: int) -> hf.PretrainedConfig:
        usual = {
            "num_key_value_heads": _HEADS,
            "intermediate_size": 2 * hidden,
            "max_position_embeddings": 256,
        }
        return config(**_common(layers, hidden, vocab), **(usual | special))

    return make


def _older(config: Any, **special: Any) -> MakeConfig:
    return lambda *sizes: config(**_common(*sizes), **special)


def _gemma3(layers: int, hidden: int, vocab: int) -> hf.PretrainedConfig:
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    make = _recent(hf.Gemma3TextConfig, **_SLIDING, head_dim=16, layer_types=kinds)
    return make(layers, hidden, vocab)


_GROUPED = {"num_key_value_heads": _HEADS // 2}  # 2 queries a key-value head
_WIDE = {**_GROUPED, "head_dim": 16}  # heads that are not hidden size / heads
_SLIDING = {**_GROUPED, "sliding_window": 8}  # shorter than the tests' rows
_LLAMA3 = {
    **_GROUPED,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

_CONFIGS: dict[str, MakeConfig] = {
    "llama": _recent(hf.LlamaConfig),
    "llama-gqa": _recent(hf.LlamaConfig, **_GROUPED),
    "llama-3.1": _recent(hf.LlamaConfig, **_LLAMA3),
    "llama-3.1-hub": _recent(hf.LlamaConfig, **_LLAMA3),
    "llama-3.2": _recent(hf.LlamaConfig, **_LLAMA3, head_dim=16, tie_word_embeddings=True),
    "qwen2": _recent(hf.Qwen2Config, **_GROUPED, tie_word_embeddings=True),
    "qwen2-sliding": _recent(
        hf.Qwen2Config, **_SLIDING, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": _recent(hf.Qwen3Config, **_WIDE),
    "qwen3-moe": _recent(
        hf.Qwen3MoeConfig,
        **_WIDE,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mistral": _recent(hf.MistralConfig, **_SLIDING),
    "mixtral": _recent(hf.MixtralConfig, **_GROUPED, num_local_experts=4),
    "gemma": _recent(hf.GemmaConfig, **_WIDE),
    "gemma2": _recent(
        hf.Gemma2Config,
        **_SLIDING,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": _gemma3,
    "phi": _older(hf.PhiConfig, intermediate_size=64, max_position_embeddings=256),
    "phi3": _recent(hf.Phi3Config, **_SLIDING),
    "bloom": _older(hf.BloomConfig),
    "bloom-with-head": _older(hf.BloomConfig),
    # "falcon" is the new decoder architecture (40b), "falcon-7b" the older one with a single
    # key-value head and no second layer norm, "falcon-alibi" the oldest.
    "falcon": _older(
        hf.FalconConfig,
        num_kv_heads=_HEADS // 2,
        new_decoder_architecture=True,
        multi_query=False,
        parallel_attn=True,
        bias=False,
        alibi=False,
    ),
    "falcon-7b": _older(
        hf.FalconConfig,
        num_kv_heads=1,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
    ),
    "falcon-alibi": _older(
        hf.FalconConfig,
        num_kv_heads=_HEADS,
        new_decoder_architecture=False,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        alibi=True,
    ),
    "gpt-neox": _older(hf.GPTNeoXConfig, intermediate_size=64, max_position_embeddings=256),
    "gpt2": _older(hf.GPT2Config, n_positions=256),
    "olmo2": _recent(hf.Olmo2Config, **_GROUPED),
    "smollm3": _recent(hf.SmolLM3Config, **_GROUPED, no_rope_layer_interval=2),
    "granite": _recent(
        hf.GraniteConfig,
        **_GROUPED,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
        logits_scaling=8.0,
    ),
    "cohere2": _recent(hf.Cohere2Config, **_SLIDING),
    "starcoder2": _recent(hf.Starcoder2Config, **_GROUPED),
}
FAMILIES = tuple(_CONFIGS)

# For tests that they are refused.
_REFUSED: dict[str, MakeConfig] = {
    "opt": _older(hf.OPTConfig, ffn_dim=64, word_embed_proj_dim=32),
}
