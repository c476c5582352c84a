"""How prompts begin: which tokens' words, for which seed, and where a search has none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
)

from tests.tiny_models import write_tiny_model
from tests.trials import CLASSES, VOCAB
from tune_app.apply.logits import row_scores
from tune_app.apply.prompts_folder import read_about
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.models.folder import model_folder
from tune_app.run.config_checks import check_search_config
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.search.checks import check_everything
from tune_app.study.yaml_space import load_space
from tune_app.tasks.classification import CLASSIFICATION
from tune_app.tasks.known import TASKS, check_init
from tune_app.tasks.loading import load_task_data
from tune_app.tasks.start_tokens import MOST_FREQUENT, StartTokens, start_tokens
from tune_app.train import cli as train
from tune_app.train.prompt_model import PromptTunedModel

START = StartTokens(
    frequent=tuple(range(10, 40)), text=(41, 42, 43), class_names=((50, 51), (52,), (53, 54, 55))
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)
    return LocalBackbone(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder("demo"))


def model_of(backbone, start=START, **values) -> PromptTunedModel:
    run = partial(run_alone, backbone)
    config = TrialConfig(**values)
    assert config.check() == []
    return PromptTunedModel(backbone, run, CLASSIFICATION, CLASSES, config, start)


def token_of(backbone, vector_H: torch.Tensor) -> int | None:
    """The token whose word embedding it is."""
    words_VH = backbone.embed(torch.arange(VOCAB)[None])[0]
    same = (words_VH == vector_H).all(dim=1).nonzero()
    return int(same) if len(same) else None


def test_vocab_takes_different_frequent_tokens_by_the_seed(backbone):
    def tokens(seed: int) -> list[int | None]:
        prompt = model_of(backbone, init="vocab", prompt_length=30, seed=seed).prompt_embeddings
        return [token_of(backbone, vector) for vector in prompt]

    assert sorted(tokens(0)) == list(START.frequent)
    assert tokens(0) == tokens(0) != tokens(1)


def test_a_prompt_longer_than_the_vocabulary_repeats_it(backbone):
    few = StartTokens(frequent=(7, 9))
    prompt = model_of(backbone, few, init="vocab", prompt_length=5).prompt_embeddings
    tokens = [token_of(backbone, vector) for vector in prompt]
    assert sorted(set(tokens)) == [7, 9]
    assert tokens[:2] == tokens[2:4]


@pytest.mark.parametrize(
    ("length", "tokens"), [(2, [41, 42]), (3, [41, 42, 43]), (5, [41, 42, 43, 41, 42])]
)
def test_text_is_cut_or_repeated(backbone, length, tokens):
    prompt = model_of(backbone, init="text", prompt_length=length).prompt_embeddings
    assert [token_of(backbone, vector) for vector in prompt] == tokens


def test_labels_are_the_means_of_their_tokens_and_the_rest_is_vocabulary(backbone):
    prompt = model_of(backbone, init="labels", prompt_length=5).prompt_embeddings
    names = [backbone.embed(torch.tensor([ids]))[0].mean(0) for ids in START.class_names]
    first = prompt[:3].detach()
    for name in names:
        assert any(torch.allclose(vector, name) for vector in first)
    assert {token_of(backbone, vector) for vector in prompt[3:]} <= set(START.frequent)
    assert model_of(backbone, init="labels", prompt_length=2).prompt_embeddings.shape[0] == 2


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_starts_of_one_seed_differ_in_nothing_but_the_prompt(backbone, mode):
    normal, vocab = (model_of(backbone, init=i, tuning_mode=mode) for i in ("normal", "vocab"))
    for (name, a), (_, b) in zip(normal.named_parameters(), vocab.named_parameters(), strict=True):
        assert torch.equal(a, b) == (name != "prompt_embeddings")


def test_deep_prompts_of_zero_begin_as_no_deep_prompts(backbone):
    rows = [[5, 6, 7], [8, 9]]
    plain = model_of(backbone)
    deep = {
        init: model_of(backbone, tuning_mode="deep_ptune", deep_init=init)
        for init in ("zero", "normal")
    }
    with torch.no_grad():
        for model in deep.values():  # the score is drawn after the deep prompts
            model.score.copy_(plain.score)
    torch.testing.assert_close(row_scores(deep["zero"], rows), row_scores(plain, rows))
    normal = row_scores(deep["normal"], rows)
    assert not torch.allclose(normal, row_scores(plain, rows), atol=1e-2)


_TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_TINY),
        Gemma2Config(**_TINY, query_pre_attn_scalar=8),  # this one and the next scale their words
        Gemma3TextConfig(**_TINY, query_pre_attn_scalar=8),
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_prompt_of_words_is_those_words(tmp_path, config):
    """Words in the prompt and words in front of the text are the same to the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backbone = LocalBackbone(tmp_path, device="cpu", dtype="float32")
    words = (11, 12, 13)
    prompted = model_of(backbone, StartTokens(text=words), init="text", prompt_length=3)
    shorter = model_of(backbone, StartTokens(text=words[:1]), init="text", prompt_length=1)
    with torch.no_grad():
        shorter.score.copy_(prompted.score)
    torch.testing.assert_close(
        row_scores(prompted, [[20, 21]]),
        row_scores(shorter, [[*words[1:], 20, 21]]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_no_tokens_for_an_init_is_an_error(backbone):
    for init in ("vocab", "text", "labels"):
        with pytest.raises(ValueError, match=f"init '{init}': the task has no tokens"):
            model_of(backbone, StartTokens(), init=init)


def test_start_tokens_of_a_task(tokenizer):
    rows = [[tokenizer.bos_token_id, 9, 9, 8], [tokenizer.bos_token_id, 9, 8, 7]]
    start = start_tokens(rows, ["asyncio", "json"], "the package", tokenizer)
    assert start.frequent == (9, 8, 7)
    assert tokenizer.decode(list(start.text)).strip() == "the package"
    assert [tokenizer.decode(list(ids)).strip() for ids in start.class_names] == ["asyncio", "json"]
    many = start_tokens([range(2 * MOST_FREQUENT)], [], None, tokenizer)
    assert len(many.frequent) == MOST_FREQUENT
    assert many.text == ()
    assert many.class_names == ()


def test_the_tokens_are_those_of_the_training_rows(tokenizer):
    config = SearchConfig(init_text="words")
    data = load_task_data(config, tokenizer)
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    for i in range(len(data.train)):
        counts.index_add_(
            0,
            data.train.batch([i]).tokens_BT[0],
            torch.ones_like(data.train.batch([i]).tokens_BT[0]),
        )
    counts[tokenizer.all_special_ids] = 0
    assert counts[data.start.frequent[0]] == counts.max()
    assert len(data.start.class_names) == len(data.class_names)
    assert data.start.text
    assert (
        load_task_data(replace(config, init_text=None), tokenizer).fingerprint == data.fingerprint
    )


def test_trial_config_checks_the_start():
    assert TrialConfig.from_dict({}).init == "normal"  # prompts and runs of before
    assert TrialConfig(init="vocab", tuning_mode="deep_ptune", deep_init="zero").check() == []
    (message,) = TrialConfig(deep_init="zero").check()
    assert message.startswith("deep_init: needs tuning_mode 'deep_ptune', got 'zero' with 'ptune'")
    with pytest.raises(ConfigError, match="init: must be one of normal, vocab, text, labels"):
        TrialConfig.from_dict({"init": "vocabulary"})


def space_file(tmp_path: Path, init: str, more: str = "") -> str:
    file = tmp_path / "space.yaml"
    lr = "lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}"
    file.write_text(f"parameters:\n  {lr}\n  init: {init}\n{more}")
    return str(file)


@pytest.mark.parametrize(
    ("values", "inits"),
    [
        ({}, ("normal", "vocab", "labels")),
        ({"task": "causal-lm"}, ("normal", "vocab")),
        ({"init_text": "Sentiment:"}, ("normal", "vocab", "labels", "text")),
        ({"task": "causal-lm", "init_text": "A poem:"}, ("normal", "vocab", "text")),
    ],
)
def test_the_default_space_has_the_starts_that_the_search_has(values, inits):
    for name in ("default", "deep"):
        space = check_everything(SearchConfig(space=name, backbone="local", **values))
        assert set(space.distributions()["init"].choices) == set(inits)
        assert {p["init"] for p in space.sample(60, 0)} == set(inits)


@pytest.mark.parametrize(
    ("init", "more", "values", "expected"),
    [
        ("{space: choice, categories: [normal, text]}", "", {}, "'text' needs --init-text"),
        (
            "{space: choice, categories: [normal, labels]}",
            "",
            {"task": "causal-lm"},
            "'labels' needs class names, and --task causal-lm has none; possible here are normal",
        ),
        (
            "{space: choice, categories: [normal], where_possible: [text]}",
            "enqueue: [{init: text}]\n",
            {},
            r"enqueue\[0\].init: 'text' needs --init-text",
        ),
        (
            "{space: choice, categories: [normal], where_possible: [normal]}",
            "",
            {},
            "must differ from each other",
        ),
        (
            "{space: choice, categories: [normal], where_possible: words}",
            "",
            {},
            "where_possible: must be a list",
        ),
        (
            "{space: choice, categories: [normal, vocab]}",
            "fixed: {tuning_mode: ptune}\n",
            {"trial": {"init": "text"}},
            "trial: init: 'text' needs --init-text",
        ),
        (
            "{space: choice, categories: [normal]}",
            "",
            {"init_text": " "},
            "--init-text: must contain",
        ),
    ],
)
def test_a_start_that_the_search_does_not_have_is_refused(tmp_path, init, more, values, expected):
    config = SearchConfig(space=space_file(tmp_path, init, more), backbone="local", **values)
    with pytest.raises(ConfigError, match=expected):
        check_everything(config)


def test_a_prior_is_of_the_starts_that_are_left(tmp_path):
    init = "{space: choice, categories: [normal], where_possible: [text], prior: {text: 1}}"
    file = space_file(tmp_path, init)
    space = load_space(file)
    without = space.within(partial(check_init, SearchConfig()))
    assert without.parameters[1].prior is None
    with_text = space.within(partial(check_init, SearchConfig(init_text="x")))
    assert with_text.parameters[1].prior is not None


def test_labels_can_begin_the_prompts_of_every_task_with_classes(monkeypatch):
    monkeypatch.setitem(TASKS, "stars", replace(CLASSIFICATION, name="stars"))
    assert check_init(SearchConfig(task="stars"), "labels") is None
    assert "--task regression has none" in check_init(SearchConfig(task="regression"), "labels")


def test_where_possible_is_for_init_alone(tmp_path):
    file = Path(space_file(tmp_path, "{space: choice, categories: [normal]}"))
    file.write_text(file.read_text().replace("lr: {space:", "lr: {where_possible: [1], space:"))
    with pytest.raises(ConfigError, match=r"lr\.where_possible: loguniform does not take it"):
        load_space(str(file))


def test_a_resumed_run_keeps_its_own_copy_of_a_shipped_space(tmp_path):
    """Else a run of another version could not go on: its default space had other ranges."""
    begun = SearchConfig(backbone="local")
    run = RunDir(tmp_path)
    run.append_event({"event": "search_started"})
    run.write_atomic(run.search_yaml, begun.to_yaml())
    run.write_atomic(
        run.space_yaml, "parameters:\n  lr: {space: loguniform, lower: 1.0e-3, upper: 1.0e-2}\n"
    )
    space = check_everything(replace(begun, resume=run.path, out=run.path))
    assert space.sampled_names == ("lr",)
    assert space.name == "default"
    with pytest.raises(ConfigError, match="--space: init: absent, now"):
        check_everything(replace(begun, space="quick", resume=run.path, out=run.path))


def test_train_best_yaml_and_the_export_hold_the_start(tmp_path):
    from tests.trained import flags

    (tmp_path / "config.yaml").write_text("trial: {lr: 0.0001, warmup_steps: 2, init: text}\n")
    told = [f"--config={tmp_path / 'config.yaml'}", *flags(tmp_path), f"--out={tmp_path / 'run'}"]
    assert train.main(told) == 2
    assert train.main([*told, "--init-text=bird or fish"]) == 0
    about = read_about(tmp_path / "run" / "prompts")
    assert about.config.init == "text"
    assert about.search["init_text"] == "bird or fish"
    card = (tmp_path / "run" / "prompts" / "README.md").read_text()
    assert "init text (`bird or fish`)" in card
    again = SearchConfig.from_yaml(tmp_path / "run" / "search.yaml")
    assert again.init_text == "bird or fish"
    assert check_search_config(again) == []
