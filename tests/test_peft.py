"""The exported folder in other hands: PEFT, transformers alone, and what a hub reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig, Qwen3Config

from tests.tiny_models import write_tiny_model
from tune_app.apply.logits import next_token_logits, row_scores
from tune_app.apply.prompts_folder import About, read_about, read_weights, write_prompts
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.models.identity import ModelIdentity
from tune_app.run.search_config import TrialConfig
from tune_app.tasks.known import TASKS
from tune_app.train.prompt_model import PromptTunedModel

CLASSES = ("bird", "fish", "tree")
PROMPT = 4
TEXTS = ["wing", "a river of fins and gills", "branch root"]
_SHAPE = {"vocab_size": 2048, "hidden_size": 32, "initializer_range": 0.2}
_ROPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": LlamaConfig(**_SHAPE, **_ROPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**_SHAPE, **_ROPE, num_key_value_heads=2, head_dim=16),
    "bloom": BloomConfig(**_SHAPE, n_layer=2, n_head=4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Family -> the folder of a tiny random model with the demo's tokenizer."""
    root, folders = tmp_path_factory.mktemp("models"), {}
    write_tiny_model("llama", root / "tokenizer")
    for family, config in CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (root / family / name).write_bytes((root / "tokenizer" / name).read_bytes())
        folders[family] = root / family
    return folders


def export(folder: Path, model: Path, task: str, **values) -> tuple[Path, PromptTunedModel]:
    """A folder of random prompts for the model, and those prompts in our hands."""
    config = TrialConfig(prompt_length=PROMPT, **values)
    names = CLASSES if task == "classification" else ()
    backbone = LocalBackbone(model, device="cpu", dtype="float32")
    tuned = PromptTunedModel(
        backbone, partial(run_alone, backbone), TASKS[task], len(names), config
    )
    about = About(
        model=ModelIdentity.of(str(model), model),
        task=task,
        class_names=names,
        max_length=12,
        trial=3,
        trained_as=3,
        config=config,
        metrics={"valid": {"loss": 1.5}, "test": {"loss": 1.25, "accuracy": 0.5}},
        search={"train": "hf://datasets/acme/birds/train.csv", "dtype": "float32"},
        data_fingerprint="f",
        tune_app="0",
    )
    weights = {name: weight.numpy() for name, weight in tuned.state_dict().items()}
    return write_prompts(folder, weights, about), tuned


def snippet(folder: Path, model: Path, containing: str) -> dict:
    """What the lines of the card that contain this leave behind, once they have run."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if containing in block]
    names = {"MODEL": str(model), "FOLDER": str(folder)}
    exec(code, names)
    return names


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_gives_our_logits_of_a_text(tmp_path, models, family):
    folder, ours = export(tmp_path, models[family], "causal-lm")
    theirs = snippet(folder, models[family], "PeftModel")["model"]
    row = [5, 60, 7, 80, 9]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([row])).logits[0]
    assert len(logits) == PROMPT + len(row)
    for end in range(1, len(row) + 1):
        torch.testing.assert_close(
            logits[PROMPT + end - 1], next_token_logits(ours, row[:end]), rtol=1e-5, atol=1e-5
        )
    assert logits.std() > 0.01  # they say something


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_gives_our_scores_of_classes(tmp_path, models, family):
    """The lines of the card do; the model's own logits do for the longest row of a batch alone,
    because transformers pools the last position, padding included."""
    folder, ours = export(tmp_path, models[family], "classification")
    theirs = snippet(folder, models[family], "PeftModel")
    tokenizer = AutoTokenizer.from_pretrained(models[family])
    rows = tokenizer(TEXTS)["input_ids"]
    expected = row_scores(ours, rows)
    torch.testing.assert_close(theirs["scores"](TEXTS), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        padded = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
        pooled = theirs["model"](**padded).logits
        alone = theirs["model"](input_ids=torch.tensor([rows[0]])).logits
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    close = [torch.allclose(a, b, atol=1e-4) for a, b in zip(pooled, expected, strict=True)]
    assert close == [i == longest for i in range(len(rows))]
    torch.testing.assert_close(alone, expected[:1], rtol=1e-5, atol=1e-5)


def test_the_tensor_in_front_of_the_words_continues_as_ours_does(tmp_path, models):
    folder, ours = export(tmp_path, models["llama"], "causal-lm")
    theirs = snippet(folder, models["llama"], "inputs_embeds")
    tokens = theirs["tokens"][0].tolist()
    generated = theirs["model"].generate(
        inputs_embeds=theirs["embeds"][None], max_new_tokens=3, do_sample=False
    )[0]
    for token in generated.tolist():
        assert token == int(next_token_logits(ours, tokens).argmax())
        tokens.append(token)


def test_deep_prompts_have_no_adapter(tmp_path, models):
    export(tmp_path, models["llama"], "causal-lm")
    assert (tmp_path / "adapter_config.json").is_file()
    folder, _ = export(tmp_path, models["llama"], "causal-lm", tuning_mode="deep_ptune")
    assert not list(folder.glob("adapter_*"))  # those of the prompts before are gone, too
    card = (folder / "README.md").read_text()
    assert "PEFT has no adapter type for deep prompts" in card
    assert ModelCard(card).data.library_name == "tune_app"


def test_a_hub_reads_the_card(tmp_path, models):
    folder, _ = export(tmp_path, models["llama"], "classification")
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None  # no hub has this folder
    assert text.splitlines()[1].startswith("# base_model: ORGANISATION/NAME")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["prompt-tuning", "ptune", "tune_app"]
    assert card.data.datasets == ["acme/birds"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"loss": 1.25, "accuracy": 0.5}
    assert {result.dataset_type for result in card.data.eval_results} == {"acme/birds"}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}


def test_a_model_of_a_hub_is_the_base_model(tmp_path, models):
    folder, _ = export(tmp_path, models["llama"], "causal-lm")
    about = read_about(folder)
    hub = replace(about, model=replace(about.model, name="acme/tiny-llama", revision="abc"))
    hub = replace(hub, search={**about.search, "train": None}, metrics={"valid": {"loss": 1.0}})
    weights = {name: weight.numpy() for name, weight in read_weights(folder).items()}
    write_prompts(folder, weights, hub)
    data = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("acme/tiny-llama", "adapter")
    assert "datasets" not in data
    assert "model-index" not in data  # the validation rows have chosen these prompts
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny-llama", "abc")
