"""What is refused as a model, and that nothing good is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tune_app.models.checks import check_checkpoint, check_files
from tune_app.models.folder import model_folder
from tune_app.models.weights import compare

LAYERS, VOCAB = 2, 2048
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 1}
_FALCON = {"bias": False, "alibi": False}
# Model type -> variants of its config.
GOOD: dict[str, list[dict[str, Any]]] = {
    "llama": [_COMMON | _GQA, _COMMON | _GQA | {"tie_word_embeddings": True, "head_dim": 16}],
    "qwen2": [_COMMON | _GQA | {"use_sliding_window": True, "max_window_layers": 1}],
    "qwen3": [_COMMON | _GQA | {"head_dim": 16}],
    "qwen3_moe": [
        _COMMON | _GQA | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    ],
    "mistral": [_COMMON | _GQA],
    "mixtral": [_COMMON | _GQA | {"num_local_experts": 4}],
    "gemma": [_COMMON | _GQA | {"head_dim": 16}],
    "gemma2": [_COMMON | _GQA | {"head_dim": 16}],
    "gemma3_text": [_COMMON | _GQA | {"head_dim": 16}],
    "phi": [_COMMON | {"intermediate_size": 64}],
    "phi3": [_COMMON | _GQA],
    "bloom": [{**_GPT, "hidden_size": 32, "n_embd": 32}],
    "falcon": [
        _COMMON | _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
        _COMMON | _FALCON | {"multi_query": True},
        _COMMON | {"bias": True, "alibi": True, "multi_query": False, "parallel_attn": False},
    ],
    "gpt_neox": [_COMMON | {"intermediate_size": 64}],
    "gpt2": [_GPT | {"n_positions": 128, "eos_token_id": 2}],
    "olmo2": [_COMMON | _GQA],
    "smollm3": [_COMMON | _GQA],
    "granite": [_COMMON | _GQA],
    "cohere2": [_COMMON | _GQA],
    "starcoder2": [_COMMON | _GQA],
}


def model_of(family: str, **values: Any) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(family, **values)
    return AutoModelForCausalLM.from_config(config)


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder("demo") / name, folder / name)
    return folder


def mistakes_in(folder: Path) -> list[str]:
    mistakes: list[str] = []
    blocks = check_checkpoint(folder, mistakes)
    assert blocks == (0 if mistakes else LAYERS), mistakes
    return mistakes


def mistake_in(folder: Path) -> str:
    (message,) = mistakes_in(folder)
    assert str(folder) in message
    return message


@pytest.fixture(autouse=True)
def _memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_tiny_model("llama", tmp_path / "model")


@pytest.mark.parametrize("family", GOOD)
def test_a_folder_that_transformers_saved_is_good(family: str, tmp_path: Path) -> None:
    """As it is, in pieces, and as pytorch's file with the names that the class has today."""
    for number, values in enumerate(GOOD[family]):
        model = model_of(family, **values)
        assert mistakes_in(save(model, tmp_path / f"{number}")) == []
        pieces = save(model, tmp_path / f"{number}-pieces", max_shard_size="100KB")
        assert (pieces / "model.safetensors.index.json").is_file()
        assert mistakes_in(pieces) == []
        model.config.save_pretrained(tmp_path / f"{number}-bin")
        torch.save(model.state_dict(), tmp_path / f"{number}-bin" / "pytorch_model.bin")
        assert mistakes_in(with_tokenizer(tmp_path / f"{number}-bin")) == []


@pytest.mark.parametrize("family", ["bloom", "gpt2", "falcon", "gemma"])
def test_a_tied_head_need_not_be_in_the_file(family: str, tmp_path: Path) -> None:
    """As published BLOOM and GPT-2 checkpoints: names without `transformer.`."""
    model = model_of(family, **GOOD[family][0])
    assert mistakes_in(save(model.base_model, tmp_path / "model")) == []


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        (
            "gpt2",
            {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ()},
        ),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("falcon", {"transformer.h.0.self_attention.maybe_rotary.inv_freq": (4,)}),
        ("gpt_neox", {"gpt_neox.layers.1.attention.bias": (1, 1, 8, 8)}),
        ("llama", {"v_head.summary.weight": (1, 32), "score.weight": (2, 32)}),
    ],
)
def test_what_changes_nothing_may_be_there_too(
    family: str, buffers: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """Masks and frequencies of old files, and heads of other uses."""
    folder = save(model_of(family, **GOOD[family][0]), tmp_path / "model")
    change_weights(folder, lambda w: w | {name: torch.ones(s) for name, s in buffers.items()})
    assert mistakes_in(folder) == []


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(word: str) -> Callable[[dict], dict]:
    return lambda weights: {name: value for name, value in weights.items() if word not in name}


def test_a_missing_block(llama: Path) -> None:
    change_weights(llama, without("layers.1."))
    assert "lacks 9 of the 21 weights of a llama model: model.layers.1.input" in mistake_in(llama)


def test_names_with_a_prefix(llama: Path) -> None:
    change_weights(llama, lambda weights: {f"module.{k}": v for k, v in weights.items()})
    message = mistake_in(llama)
    assert "lacks 21 of the 21" in message
    assert "It has them as module.*; save the model itself" in message


def test_a_missing_head(tmp_path: Path) -> None:
    folder = save(model_of("llama", **GOOD["llama"][0]).model, tmp_path / "model")
    assert "lm_head.weight. It was saved without its head; save the whole LlamaFor" in mistake_in(
        folder
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
    ],
)
def test_weights_that_the_model_would_ignore(name: str, llama: Path) -> None:
    """A block, a bias or a norm more than config.json has: another model than the one saved."""
    change_weights(llama, lambda weights: weights | {name: torch.ones(32)})
    assert f"has 1 weights that the llama model of config.json does not use: {name}" in (
        mistake_in(llama)
    )


def test_weights_of_other_shapes(llama: Path) -> None:
    change_json(llama / "config.json", intermediate_size=96)
    assert "model.layers.0.mlp.down_proj.weight (32, 64), should be (32, 96); " in mistake_in(llama)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5268016\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(name: str, llama: Path) -> None:
    (llama / name).write_text(POINTER)
    message = mistake_in(llama)
    assert f"has Git LFS pointers instead of files: {name}." in message
    assert "git lfs pull" in message


def test_a_cut_file(llama: Path) -> None:
    os.truncate(llama / "model.safetensors", 99_999)
    assert "is cut short: it has 99,999 bytes, but should have " in mistake_in(llama)
    os.truncate(llama / "model.safetensors", 99)
    assert "is damaged or not a safetensors file" in mistake_in(llama)
    os.truncate(llama / "model.safetensors", 0)
    assert "is damaged or not a safetensors file" in mistake_in(llama)


def test_a_cut_bin_file(llama: Path) -> None:
    as_bin(llama, load_file(llama / "model.safetensors"))
    assert mistakes_in(llama) == []
    os.truncate(llama / "pytorch_model.bin", 99_999)
    assert "is cut short or does not contain weights. Save the model as" in mistake_in(llama)


def as_bin(folder: Path, content: Any) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code of the file has run",)


def test_a_bin_file_runs_no_code(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_bin(llama, load_file(llama / "model.safetensors") | {"extra": Harmful()})
    assert "contains more than tensors; that could run code, so it is not read" in mistake_in(llama)
    assert capsys.readouterr().out == ""
    with pytest.raises(Exception, match="eights"):
        AutoModelForCausalLM.from_pretrained(llama)
    assert capsys.readouterr().out == ""


def test_a_missing_piece(tmp_path: Path) -> None:
    folder = save(model_of("llama", **GOOD["llama"][0]), tmp_path / "model", max_shard_size="100KB")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lists 3 files, of which 1 are missing: model-00002-of-00003" in mistake_in(folder)


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "model.gguf")
    message = mistake_in(llama)
    assert "has no weights: none of model.safetensors, " in message
    assert "It has model.gguf, which must be converted first." in message


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.T5Config(num_layers=1), "an encoder-decoder model (type 't5')"),
        (transformers.BartConfig(), "an encoder-decoder model (type 'bart')"),
        (transformers.BertConfig(), "an encoder (type 'bert')"),
        (transformers.ModernBertConfig(), "an encoder (type 'modernbert')"),
        (transformers.ViTConfig(), "not a causal language model (type 'vit')"),
    ],
)
def test_another_kind_of_model(config: Any, kind: str, llama: Path) -> None:
    config.save_pretrained(llama)
    assert f"is {kind}; must be a causal language model" in mistake_in(llama)


def test_blocks_where_no_family_has_them(tmp_path: Path) -> None:
    folder = save(model_of("opt", **_COMMON, ffn_dim=64, word_embed_proj_dim=32), tmp_path / "opt")
    (message,) = mistakes_in(folder)
    assert "models of type 'opt' are not supported" in message


def test_a_model_of_text_and_images(tmp_path: Path) -> None:
    text = _COMMON | _GQA | {"head_dim": 16, "pad_token_id": 0}
    images = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=images | {"num_attention_heads": 4, "image_size": 28}
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    (message,) = mistakes_in(save(model, tmp_path / "gemma3"))
    assert "models of type 'gemma3' are not supported: their blocks are not a list" in message


def test_code_of_the_folder_is_never_run(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.New"}
    for name in ("configuration_new", "modeling_new"):
        (llama / f"{name}.py").write_text("print('code of the folder has run')\n")
    change_json(llama / "config.json", model_type="new", auto_map=code)
    message = mistake_in(llama)
    assert "needs Python code that comes with the model (configuration_new.py, " in message
    change_json(llama / "config.json", model_type="llama")  # known: its own code is not needed
    assert mistakes_in(llama) == []
    assert capsys.readouterr().out == ""


def test_an_unknown_type(llama: Path) -> None:
    change_json(llama / "config.json", model_type="lama")
    assert "does not know. Did you mean 'llama'?" in mistake_in(llama)


def test_a_config_that_its_family_refuses(llama: Path) -> None:
    change_json(llama / "config.json", num_attention_heads=5)
    assert mistakes_in(llama) != []


def test_quantized_weights_and_adapters(llama: Path) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": "gptq"})
    assert "has quantized weights (gptq), which are not supported" in mistake_in(llama)
    (llama / "config.json").rename(llama / "adapter_config.json")
    assert "is a PEFT adapter, not a model" in mistake_in(llama)


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    folder = write_tiny_model("llama", tmp_path / "model", vocab=2000)
    shutil.copy(model_folder("demo") / "tokenizer.json", folder)
    message = mistake_in(folder)
    assert "its tokenizer has 2048 tokens, but its model has embeddings for 2000; " in message


def test_special_tokens_that_no_text_has(llama: Path) -> None:
    """As Gemma 3 of 1B, whose tokenizer has a token for images more than the model."""
    (llama / "special_tokens_map.json").unlink()  # an old file, which would win
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(llama)
    assert mistakes_in(llama) == []
    tokenizer.pad_token = "<image>"  # rows are padded with it
    tokenizer.save_pretrained(llama)
    assert "'<image>' (2048) have none" in mistake_in(llama)


def test_no_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    assert "its tokenizer cannot be loaded: " in mistake_in(llama)


def test_without_torch_it_is_asked_elsewhere_and_remembered(llama: Path, tmp_path: Path) -> None:
    """The command's own process never loads torch; the second time nobody does."""
    program = (
        "import sys; from pathlib import Path; from tune_app.models.checks import check_checkpoint;"
        "print(check_checkpoint(Path(sys.argv[1]), []), 'torch' in sys.modules)"
    )

    def ask() -> str:
        command = [sys.executable, "-c", program, str(llama)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert ask() == "2 False"
    (known,) = (tmp_path / "cache" / "tune_app" / "models").iterdir()
    assert known.read_text() == "2"
    known.write_text("3")
    assert ask() == "3 False"  # so it was read there
    change_weights(llama, without("layers.1."))
    assert "lacks 9 of the 21 weights" in mistake_in(llama)


def test_the_demo_model_is_good() -> None:
    folder = model_folder("demo")
    assert check_files(folder) == []
    assert compare(folder) == (4, [])  # what `check_checkpoint` takes for granted
    assert check_checkpoint(folder, []) == 4
