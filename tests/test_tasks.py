"""The tasks against Hugging Face's own models, and the data that they are given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import tune_app.models.demo
from tune_app.run.search_config import SETTINGS, ConfigError, SearchConfig
from tune_app.tasks import causal_lm, classification, regression
from tune_app.tasks.data import IGNORED, DataOrder, Dataset, last_token
from tune_app.tasks.known import TASKS, check_task
from tune_app.tasks.loading import load_task_data

ROWS = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11]]
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    num_labels=3,
)
WORDS = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(tune_app.models.demo.__file__).parent / "model")


def write_rows(path: Path, count: int, labels: str = "ab", start: int = 0) -> str:
    """A csv of `count` different short texts with the labels taken in turn."""
    rows = [
        f"{WORDS[i // 10 % 10]} {WORDS[i % 10]} {i // 100},{labels[i % len(labels)]}"
        for i in range(start, start + count)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return str(path)


def rows_of(dataset: Dataset) -> set[tuple[int, ...]]:
    return {tuple(dataset.batch([i]).tokens_BT[0].tolist()) for i in range(len(dataset))}


def messages_of(config: SearchConfig, tokenizer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_task_data(config, tokenizer)
    return caught.value.messages


# Tasks by name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"task": "clasification"}, "--task: must be one of classification, causal-lm, regression"),
        ({"task": "clasification"}, "Did you mean 'classification'?"),
        ({"task": "causal-lm", "label_column": "y", "train": "x.csv"}, "which has no labels"),
        ({"task": "regression"}, "no built-in data"),
    ],
)
def test_a_task_and_its_settings_are_checked(values, expected):
    (message,) = check_task(SearchConfig(**values))
    assert expected in message


def test_help_names_every_task():
    assert all(name in SETTINGS["task"].help for name in TASKS)


# Losses, against Hugging Face


def test_causal_lm_loss_equals_hugging_face():
    torch.manual_seed(0)  # transformers initialises from the global generator
    model = LlamaForCausalLM(TINY).eval()
    batch = Dataset(ROWS).batch([0, 1, 2])
    with torch.no_grad():
        reference = model(batch.tokens_BT, labels=batch.labels)
        hidden_BTH = model.model(batch.tokens_BT).last_hidden_state
        nll, sums = causal_lm.loss_sum(model.lm_head(hidden_BTH), batch.labels)
    torch.testing.assert_close(nll / sums["targets"], reference.loss)


def test_causal_lm_sums_do_not_depend_on_the_batches():
    logits_BTV = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    dataset = Dataset(ROWS)
    whole_nll, whole = causal_lm.loss_sum(logits_BTV, dataset.batch([0, 1, 2]).labels)
    assert whole == {"targets": 4 + 1 + 2}
    nll, tokens = 0.0, 0
    for i in range(3):
        labels_BT = dataset.batch([i]).labels
        row_nll, row = causal_lm.loss_sum(logits_BTV[i : i + 1, : labels_BT.shape[1]], labels_BT)
        nll, tokens = nll + row_nll.item(), tokens + row["targets"]
    assert tokens == whole["targets"]
    assert nll == pytest.approx(whole_nll.item(), rel=1e-6)


def test_perplexity():
    assert causal_lm.perplexity(2.0) == pytest.approx(math.exp(2))
    assert causal_lm.perplexity(1e6) == math.inf


def test_classification_equals_hugging_face():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(TINY).eval()
    batch = Dataset(ROWS, labels=[2, 0, 1]).batch([0, 1, 2])
    with torch.no_grad():
        reference = model(batch.tokens_BT, labels=batch.labels)
        hidden_BTH = model.model(batch.tokens_BT).last_hidden_state
        logits_BC = model.score(last_token(hidden_BTH, batch.lengths_B))
    torch.testing.assert_close(logits_BC, reference.logits)
    loss_sum, sums = classification.loss_sum(logits_BC, batch.labels)
    torch.testing.assert_close(loss_sum / sums["targets"], reference.loss)


def test_accuracy_counts_the_rows_whose_own_class_scores_highest():
    logits_BC = torch.tensor([[0.1, 2.0], [3.0, 1.0], [0.0, 1.0]])
    _, sums = classification.loss_sum(logits_BC, torch.tensor([1, 1, 1]))
    metrics = classification.CLASSIFICATION.metrics(0.0, sums)
    # Class 0, which no row is but one was called, has an F1 of 0; class 1 one of 0.8.
    assert metrics == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(0.4)}


def test_regression_equals_hugging_face():
    torch.manual_seed(0)
    config = LlamaConfig(**TINY.to_diff_dict() | {"num_labels": 1, "problem_type": "regression"})
    model = LlamaForSequenceClassification(config).eval()
    batch = Dataset(ROWS, labels=[-0.5, 1.25, 0.0]).batch([0, 1, 2])
    with torch.no_grad():
        reference = model(batch.tokens_BT, labels=batch.labels)
        hidden_BTH = model.model(batch.tokens_BT).last_hidden_state
        outputs_B1 = model.score(last_token(hidden_BTH, batch.lengths_B))
    loss_sum, sums = regression.loss_sum(outputs_B1, batch.labels)
    torch.testing.assert_close(loss_sum / sums["targets"], reference.loss)


def test_r2_over_batches_equals_numpys_squared_correlation_of_the_best_line():
    draw = np.random.default_rng(0)
    x = draw.normal(size=40)
    y = (2 * x + draw.normal(size=40)).astype(np.float32)
    fitted = np.polyval(np.polyfit(x, y, 1), x).astype(np.float32)
    total, sums = 0.0, {}
    for part in (slice(0, 7), slice(7, 40)):
        outputs_B1 = torch.from_numpy(fitted[part])[:, None]
        loss, more = regression.loss_sum(outputs_B1, torch.from_numpy(y[part]))
        total += float(loss)
        sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
    assert regression.r2(total / 40, sums) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-5)
    assert math.isnan(regression.r2(0.5, {"targets": 2, "labels": 2.0, "squares": 2.0}))


# Batches and their order


def test_batch_is_padded_right_to_its_longest_row():
    batch = Dataset(ROWS, pad_id=31).batch(torch.tensor([2, 1]))
    assert batch.tokens_BT.tolist() == [[1, 10, 11], [1, 9, 31]]
    assert batch.labels.tolist() == [[1, 10, 11], [1, 9, IGNORED]]
    assert batch.lengths_B.tolist() == [3, 2]


def test_batch_of_classes():
    assert Dataset(ROWS, labels=[2, 0, 1]).batch([2, 0]).labels.tolist() == [1, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 23])
def test_order_shows_every_row_once_a_pass(batch_size):
    order = DataOrder(size=7, batch_size=batch_size, seed=3)
    shown = torch.cat([order.indices(step) for step in range(21)]).tolist()
    assert len(shown) == 21 * batch_size
    passes = [shown[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3, "each pass is shuffled anew"


def test_order_depends_on_seed_and_step_only():
    order = DataOrder(50, 4, seed=1)
    expected = order.indices(30)
    torch.manual_seed(9)
    DataOrder(50, 4, seed=2).indices(30)
    assert torch.equal(DataOrder(50, 4, seed=1).indices(30), expected)
    assert not torch.equal(DataOrder(50, 4, seed=2).indices(30), expected)


# Loading


@pytest.mark.parametrize("max_length", [8, 48])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_built_in_splits_do_not_overlap(task, max_length, tokenizer):
    data = load_task_data(SearchConfig(task=task, max_length=max_length), tokenizer)
    train, valid, test = (rows_of(split) for split in (data.train, data.valid, data.test))
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert len(data.train) > 1000
    assert len(data.valid) > 80
    assert len(data.test) > 80
    assert len(data.class_names) == (8 if task == "classification" else 0)
    assert max(len(row) for row in train) == max_length
    assert any(f"longer than --max-length {max_length}" in note for note in data.notes)


def test_valid_and_test_are_a_tenth_each_where_not_given(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.csv", 200)
    data = load_task_data(SearchConfig(train=path), tokenizer)
    assert (len(data.train), len(data.valid), len(data.test)) == (160, 20, 20)
    train, valid, test = (rows_of(split) for split in (data.train, data.valid, data.test))
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert sum("of the training rows for it" in note for note in data.notes) == 2
    again = load_task_data(SearchConfig(train=path, seed=5), tokenizer)
    assert again.fingerprint == data.fingerprint


def test_repeated_texts_stay_on_one_side_of_a_split(tmp_path, tokenizer):
    path = tmp_path / "train.csv"
    lines = Path(write_rows(path, 30)).read_text().splitlines()
    path.write_text("\n".join(lines + lines[1:]) + "\n")
    data = load_task_data(SearchConfig(train=str(path), task="causal-lm"), tokenizer)
    assert (len(data.train), len(data.valid), len(data.test)) == (48, 6, 6)
    assert not rows_of(data.train) & rows_of(data.valid)


def test_given_splits_are_kept_and_repeated_rows_counted(tmp_path, tokenizer):
    config = SearchConfig(
        train=write_rows(tmp_path / "train.csv", 40),
        valid=write_rows(tmp_path / "valid.csv", 10, start=37),
        test=write_rows(tmp_path / "test.csv", 10, start=50),
    )
    data = load_task_data(config, tokenizer)
    assert (len(data.train), len(data.valid), len(data.test)) == (40, 10, 10)
    assert data.notes[0] == "3 valid rows are also in train"
    assert [note for note in data.notes[1:] if "demo model" not in note] == []
    assert data.class_names == ("a", "b")
    assert data.train.batch([0, 1]).labels.tolist() == [0, 1]


def test_plain_text_is_cut_into_rows(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"{a} {b}" for a in WORDS for b in WORDS))
    stream = tokenizer(path.read_text())["input_ids"]
    data = load_task_data(SearchConfig(train=str(path), task="causal-lm", max_length=16), tokenizer)
    rows = [rows_of(split) for split in (data.train, data.valid, data.test)]
    cut = {tuple(stream[i : i + 16]) for i in range(0, len(stream), 16)}
    assert set.union(*rows) == cut


def test_fingerprint_changes_with_a_label(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.csv", 30)
    before = load_task_data(SearchConfig(train=path), tokenizer).fingerprint
    Path(path).write_text(Path(path).read_text().replace("golf 0,a", "golf 0,b", 1))
    assert load_task_data(SearchConfig(train=path), tokenizer).fingerprint != before


class WithoutPad:
    """A tokenizer that has neither a pad token nor an end token, as some checkpoints' have."""

    pad_token_id = eos_token_id = None
    all_special_ids = ()

    def __init__(self, inner):
        self._inner = inner

    def __call__(self, *args, **kwargs):
        return self._inner(*args, **kwargs)


def test_a_tokenizer_without_pad_token_does(tmp_path, tokenizer):
    config = SearchConfig(train=write_rows(tmp_path / "train.csv", 30), task="causal-lm")
    with_pad = load_task_data(config, tokenizer)
    without = load_task_data(config, WithoutPad(tokenizer))
    assert without.fingerprint == with_pad.fingerprint
    indices = range(len(without.train))
    assert torch.equal(without.train.batch(indices).labels, with_pad.train.batch(indices).labels)


# Mistakes


def test_mistakes_of_all_files_come_together(tmp_path, tokenizer):
    (tmp_path / "empty.csv").touch()
    config = SearchConfig(
        train=str(tmp_path / "gone.csv"), valid=str(tmp_path / "empty.csv"), test="x.doc"
    )
    messages = messages_of(config, tokenizer)
    assert len(messages) == 3
    assert "no such file" in messages[0]
    assert "is empty" in messages[1]
    assert ".parquet" in messages[2]


def test_a_single_class_and_unknown_labels(tmp_path, tokenizer):
    config = SearchConfig(
        train=write_rows(tmp_path / "train.csv", 10, "a"),
        valid=write_rows(tmp_path / "valid.csv", 10, "ab"),
        test=write_rows(tmp_path / "test.csv", 10, "ca"),
    )
    single, valid, test = messages_of(config, tokenizer)
    assert "at least two classes" in single
    assert "'a'" in single
    assert valid.startswith(config.valid)
    assert "'b'" in valid
    assert test.startswith(config.test)
    assert "'c'" in test


def test_too_few_texts_and_splits_without_train(tmp_path, tokenizer):
    few = SearchConfig(train=write_rows(tmp_path / "train.csv", 2))
    assert "at least 3 different texts" in messages_of(few, tokenizer)[0]
    (message,) = messages_of(replace(few, train=None, valid=few.train), tokenizer)
    assert "--valid: needs --train as well" in message


def test_texts_too_short_to_predict_anything_are_dropped(tmp_path, tokenizer):
    config = SearchConfig(
        train=write_rows(tmp_path / "train.csv", 30), task="causal-lm", max_length=1
    )
    assert "no rows are left" in messages_of(config, tokenizer)[0]
