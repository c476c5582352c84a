"""Prompts with completions and chats: what is learned of a row, what is cut, what is scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

import tune_app.models.demo
from tests.tiny_models import write_tiny_model
from tune_app.apply import cli as apply
from tune_app.apply.generation import chooser, continuation
from tune_app.apply.inference import open_prompts
from tune_app.apply.prompts_folder import read_about
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.data import IGNORED, Dataset
from tune_app.tasks.known import check_task
from tune_app.tasks.loading import load_task_data
from tune_app.train import cli as train

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(tune_app.models.demo.__file__).parent / "model")


def write_pairs(path: Path, count: int = 30, names=("prompt", "completion"), first: int = 0) -> str:
    rows = [(f"say {i} twice", f"{i} and {i}") for i in range(first, first + count)]
    pd.DataFrame(rows, columns=list(names)).to_csv(path, index=False)
    return str(path)


def data_of(path: str, tokenizer, **values):
    return load_task_data(SearchConfig(task="causal-lm", train=path, **values), tokenizer)


def test_the_loss_is_over_the_completion_and_its_end_alone(tmp_path, tokenizer):
    data = data_of(write_pairs(tmp_path / "a.csv"), tokenizer)
    for i in range(len(data.train)):
        prompt, completion = data.train.completion(i)
        number = re.fullmatch(r"say (\d+) twice", tokenizer.decode(prompt, True).strip())[1]
        assert prompt == tokenizer(f"say {number} twice")["input_ids"]
        wanted = tokenizer(f"{number} and {number}", add_special_tokens=False)["input_ids"]
        assert completion == [*wanted, tokenizer.eos_token_id]
        labels = data.train.batch([i]).labels[0].tolist()
        assert labels == [IGNORED] * len(prompt) + completion
    batch = data.train.batch([0, 1, 2])
    learned = sum(len(data.train.completion(i)[1]) for i in range(3))
    assert data.task.targets(batch.labels) == learned
    assert (
        data.summary.columns["train"]
        == "prompt is column 'prompt', completion is column 'completion'"
    )


def test_columns_of_other_names_are_named(tmp_path, tokenizer):
    usual = data_of(write_pairs(tmp_path / "a.csv"), tokenizer)
    other = write_pairs(tmp_path / "b.csv", names=("question", "answer"))
    named = data_of(other, tokenizer, prompt_column="question", completion_column="answer")
    assert named.fingerprint == usual.fingerprint
    with pytest.raises(ConfigError, match="no column for --completion-column 'reply'"):
        data_of(other, tokenizer, prompt_column="question", completion_column="reply")
    (message,) = check_task(SearchConfig(task="causal-lm", train=other, prompt_column="question"))
    assert "give both or neither" in message


def test_a_long_row_loses_its_prompts_beginning_first_and_this_is_said(tmp_path, tokenizer):
    rows = [{"prompt": f"{'far away ' * 20}near {i}", "completion": f"yes {i}"} for i in range(20)]
    rows += [{"prompt": f"go on {i}", "completion": "and so on " * 20} for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data_of(str(path), tokenizer, max_length=12)
    for split in (data.train, data.valid, data.test):
        for i in range(len(split)):
            prompt, completion = split.completion(i)
            assert len(prompt) + len(completion) == 12
            text, answer = tokenizer.decode(prompt, True), tokenizer.decode(completion, True)
            if "yes" in answer:
                assert re.search(r"near \d+$", text.strip())
                assert completion[-1] == tokenizer.eos_token_id
            else:
                assert (len(prompt), len(completion)) == (1, 11)
    assert any(
        "lost the beginning of their prompt, and 10 the end of the completion" in n
        for n in data.notes
    )


def test_chats_are_written_by_the_models_own_template(tmp_path, tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chats = [
        [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": f"what is {i}?"},
            {"role": "assistant", "content": f"it is {i}"},
        ]
        for i in range(30)
    ]
    path = tmp_path / "chats.parquet"
    pd.DataFrame({"messages": chats}).to_parquet(path)
    with pytest.raises(ConfigError, match="has no chat template"):
        data_of(str(path), tokenizer)
    tokenizer.chat_template = TEMPLATE
    data = data_of(str(path), tokenizer, max_length=99)
    prompt, completion = data.train.completion(0)
    number = re.search(r"\d+", tokenizer.decode(completion))[0]
    written = f"[system] be short\n[user] what is {number}?\n[assistant] "
    assert prompt == tokenizer(written, add_special_tokens=False)["input_ids"]
    assert completion == tokenizer(f"it is {number}\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "chat", [[], "hello", [{"role": "user", "content": "a"}] * 2, [{"role": "assistant"}] * 2]
)
def test_what_is_no_chat_is_refused_with_its_row(chat, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": good}) + "\n" + json.dumps({"messages": chat}) + "\n")
    with pytest.raises(ConfigError, match="it is not in rows 2"):
        data_of(str(path), tokenizer)


def test_evaluate_scores_loss_and_exact_generation(tmp_path, capsys):
    model = write_tiny_model("llama", tmp_path / "tiny")
    given = [f"--train={write_pairs(tmp_path / 'train.csv', 30)}", f"--model={model}"]
    given += ["--task=causal-lm", "--backbone=local", "--steps=2", "--batch-size=2", "--quiet"]
    run = tmp_path / "run"
    assert train.main([*given, f"--out={run}"]) == 0
    capsys.readouterr()
    assert apply.main([str(run), "--evaluate", "--quiet"]) == 0
    assert "exact_match 0 (3 rows)" in capsys.readouterr().out

    about = read_about(run / "prompts")
    config = about.search_config()
    with open_prompts(run / "prompts", about, config, progress=print) as prompts:
        asked = prompts.tokenizer("say 7 twice")["input_ids"]
        said = list(continuation(prompts.model, asked, 3, chooser(None)))
        other = [*said[:-1], said[-1] + 1]
        rows = Dataset([asked + said, asked + other], learned_from=[len(asked)] * 2)
        assert prompts.evaluate(rows).metric["exact_match"] == 0.5


def test_a_run_is_resumed_and_evaluated_from_another_folder(tmp_path, monkeypatch):
    write_pairs(tmp_path / "train.csv")
    monkeypatch.chdir(tmp_path)
    config = SearchConfig(train="train.csv", valid="s3://data/valid.csv", model="org/name")
    (tmp_path / "search.yaml").write_text(config.to_yaml())
    monkeypatch.chdir("/")
    stored = SearchConfig.from_yaml(tmp_path / "search.yaml")
    assert stored.train == str(tmp_path / "train.csv")
    assert (stored.valid, stored.model) == ("s3://data/valid.csv", "org/name")
