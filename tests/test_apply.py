"""Exported prompts in use: the same figures as when they were made."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import write_tiny_model
from tests.trained import CLASSES, train_run, write_rows
from tune_app.apply import cli as apply
from tune_app.apply.inference import open_prompts
from tune_app.apply.logits import row_scores
from tune_app.apply.prompts_folder import read_about, read_weights
from tune_app.report.results import load
from tune_app.run import output
from tune_app.run.run_dir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return RunDir(train_run(tmp_path_factory.mktemp("classification")))


@pytest.fixture(scope="module")
def causal_run(tmp_path_factory) -> RunDir:
    return RunDir(train_run(tmp_path_factory.mktemp("causal"), task="causal-lm"))


def _apply(capsys, *told: object) -> str:
    """What the command prints on stdout."""
    capsys.readouterr()
    assert apply.main([*map(str, told), "--quiet"]) == 0
    return capsys.readouterr().out


def _mistakes(*told: object) -> str:
    said = io.StringIO()
    with redirect_stderr(said):
        assert apply.main([str(word) for word in told]) == 2
    assert "Traceback" not in said.getvalue()
    return said.getvalue()


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_evaluate_gives_the_test_figures_of_the_run(task, run, causal_run, capsys):
    run = run if task == "classification" else causal_run
    metric = {"classification": "accuracy", "causal-lm": "perplexity"}[task]
    row = load(run).best
    value = f"{row[f'test_{metric}']:.3f}" if task == "classification" else "[0-9,.]+"
    said = _apply(capsys, run.path, "--evaluate")
    figures = rf"test: loss {row['test_loss']:.3f}, {metric} {value}(, f1 [0-9.]+)?"
    assert re.fullmatch(rf"{figures} \(15 rows\)\n", said)


def test_evaluate_on_a_file_of_ones_own(run, tmp_path, capsys):
    file = write_rows(tmp_path / "mine.csv", 200, 15)  # the test split's rows
    about = read_about(run.prompts)
    expected = f"mine.csv: loss {about.metrics['test']['loss']:.3f}, "
    assert _apply(capsys, run.prompts, "--evaluate", file).startswith(expected)
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(file.read_text().replace("text,label", "words,kind"))
    columns = ["--text-column=words", "--label-column=kind"]
    said = _apply(capsys, run.prompts, "--evaluate", renamed, *columns)
    assert said.startswith(expected.replace("mine", "renamed"))


def test_changed_data_are_noticed(run, tmp_path, capsys):
    copy = tmp_path / "prompts"
    shutil.copytree(run.prompts, copy)
    text = (copy / "prompts.json").read_text()
    (copy / "prompts.json").write_text(
        text.replace(read_about(copy).data_fingerprint, "another one")
    )
    assert apply.main([str(copy), "--evaluate"]) == 0
    assert "differ from the search's" in capsys.readouterr().err


def test_lines_in_labels_out(run, capsys, monkeypatch):
    lines = ["wing song egg 1", "", "fin water 2", "a text of many more tokens than it learnt on"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    said = _apply(capsys, run.path).split("\n")
    assert len(said) == 5
    assert said[1] == said[4] == ""
    about = read_about(run.prompts)
    config = about.search_config()
    with open_prompts(run.prompts, about, config, progress=print) as prompts:
        for line, answer in zip(lines, said, strict=False):
            if line:
                ids = prompts.tokenizer(line)["input_ids"][: about.max_length]
                logits_C = row_scores(prompts.model, [ids])[0]
                label, probability = answer.split("\t")
                assert label == CLASSES[logits_C.argmax()]
                assert float(probability) == pytest.approx(
                    float(logits_C.softmax(-1).max()), abs=1e-4
                )


def test_a_table_is_answered_row_by_row_and_its_header_is_none(run, tmp_path, capsys):
    file = write_rows(tmp_path / "mine.csv", 300, 6)
    texts = [line.split(",")[0] for line in file.read_text().splitlines()[1:]]
    (tmp_path / "marked.txt").write_text("\n".join(texts), "utf-8-sig")
    of_table = _apply(capsys, run.path, "--input", file)
    assert of_table.count("\n") == len(texts)
    assert _apply(capsys, run.path, "--input", tmp_path / "marked.txt") == of_table


def test_a_file_in_another_encoding_is_refused_in_one_line_or_read_as_told(run, tmp_path, capsys):
    file = tmp_path / "latin1.txt"
    file.write_bytes(
        "\N{LATIN SMALL LETTER E WITH ACUTE}t\N{LATIN SMALL LETTER A}".encode("latin-1")
    )
    assert apply.main([str(run.path), "--input", str(file)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{file}: is not utf-8 text; give its --encoding")
    assert _apply(capsys, run.path, "--input", file, "--encoding=latin-1").count("\n") == 1


def test_greedy_continuation_is_hugging_faces(causal_run, capsys):
    about = read_about(causal_run.prompts)
    model = AutoModelForCausalLM.from_pretrained(about.model.name)
    tokenizer = AutoTokenizer.from_pretrained(about.model.name)
    tokens_BT = tokenizer("wing song", return_tensors="pt")["input_ids"]
    prompt_PH = read_weights(causal_run.prompts)["prompt_embeddings"]
    embeds_BSH = torch.cat([prompt_PH[None], model.get_input_embeddings()(tokens_BT)], dim=1)
    ones_BS = torch.ones(embeds_BSH.shape[:2], dtype=torch.int64)
    made_BT = model.generate(
        inputs_embeds=embeds_BSH, attention_mask=ones_BS, max_new_tokens=8, do_sample=False
    )
    ids = [*tokens_BT[0].tolist(), *made_BT[0].tolist()]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    said = _apply(capsys, causal_run.path, "--prompt=wing song", "--max-new-tokens=8")
    assert said == expected + "\n"


def test_another_model_is_refused(run, tmp_path):
    wider = write_tiny_model("llama", tmp_path / "wider", hidden=64)
    said = _mistakes(run.path, "--model", wider, "--prompt=wing")
    assert "llama, hidden size 32, 2 blocks" in said
    assert "llama, hidden size 64, 2 blocks" in said
    other = write_tiny_model("llama", tmp_path / "other", vocab=2050)
    assert "other entries differ" in _mistakes(run.path, "--model", other, "--prompt=wing")


def test_the_same_model_elsewhere_is_taken_and_another_training_noted(run, tmp_path, capsys):
    copy = write_tiny_model("llama", tmp_path / "copy")
    assert apply.main([str(run.path), "--model", str(copy), "--evaluate"]) == 0
    assert "not those" not in capsys.readouterr().err
    again = write_tiny_model("llama", tmp_path / "again", seed=1)
    assert apply.main([str(run.path), "--model", str(again), "--prompt=wing"]) == 0
    assert "differ from those that the prompts were trained with" in capsys.readouterr().err


def test_mistakes_are_told_together(run, causal_run, tmp_path):
    told = ["--prompt=a", "--evaluate", "--max-new-tokens=0", "--backbone=local", "--peers=x"]
    said = _mistakes(run.path, *told)
    assert "--prompt and --evaluate: give only one" in said
    assert "--max-new-tokens: must be 1 or more" in said
    assert "--peers: only with --backbone swarm" in said
    assert "neither a run" in _mistakes(tmp_path)
    assert "there is no file" in _mistakes(run.path, "--input", tmp_path / "gone.txt")
    assert "no such file" in _mistakes(run.path, "--evaluate", tmp_path / "gone.csv")
    assert "are 1005" in _mistakes(causal_run.path, "--prompt=a", "--max-new-tokens=1000")
    strange = tmp_path / "strange.csv"
    strange.write_text("text,label\nhello,stone\nworld,bird\n")
    assert "labels that the prompts do not know: 'stone'" in _mistakes(
        run.path, "--evaluate", strange
    )


def test_data_of_the_search_that_are_gone(run, tmp_path):
    copy = tmp_path / "prompts"
    shutil.copytree(run.prompts, copy)
    file = copy / "prompts.json"
    file.write_text(file.read_text().replace("test.csv", "gone.csv"))
    assert "the search's --test: there is no file" in _mistakes(copy, "--evaluate")


def test_a_run_killed_before_its_export_is_exported(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "prompts")
    assert "test: loss" in _apply(capsys, copy, "--evaluate")
    assert read_about(copy / "prompts") == read_about(run.prompts)


LINES = "\n".join(f"wing song {i}" for i in range(2000))


def test_a_reader_that_has_seen_enough(run, monkeypatch, capsys):
    """In this process, where the pipe is not the first descriptor; as a command, the next test."""
    reading, writing = os.pipe()
    forget = output.forget_output
    with open(reading) as reader, open(writing, "w") as pipe, ThreadPoolExecutor(1) as head:

        def read_one_line() -> str:
            with reader:
                return reader.readline()

        line = head.submit(read_one_line)
        monkeypatch.setattr("sys.stdin", io.StringIO(LINES))
        monkeypatch.setattr("sys.stdout", pipe)
        monkeypatch.setattr(output, "forget_output", lambda _: forget(pipe.fileno()))
        assert not apply.main([str(run.path), "--quiet"])  # None, as which a process ends well
        assert line.result().count("\n") == 1
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_head_that_has_seen_enough(run):
    command = f"{sys.executable} -m tune_app.apply {run.path} --quiet | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], input=LINES, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_text_is_drawn_by_a_seed(causal_run, capsys):
    told = (causal_run.path, "--prompt", "wing nest", "--max-new-tokens", 8)
    drawn = [_apply(capsys, *told, "--temperature", 2, "--seed", seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert _apply(capsys, *told, "--temperature", 2) == drawn[0]  # seed 0
    assert _apply(capsys, *told, "--top-p", 1e-6) == _apply(capsys, *told)  # greedy


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            ["--temperature", "0"],
            "--temperature: must be above 0, got 0.0; to take the most likely token",
        ),
        (["--top-p", "1.5"], "--top-p: must be above 0 and at most 1, got 1.5."),
        (["--seed", "3"], "--seed: only with --temperature or --top-p, which sample tokens."),
        (["--top-p", "0.5", "--seed", "-1"], "--seed: must be 0 or more, got -1."),
    ],
)
def test_what_drawing_refuses(told, said, causal_run):
    assert said in _mistakes(causal_run.path, "--prompt", "wing", *told)


def test_classes_are_not_drawn(run):
    said = _mistakes(run.path, "--prompt", "wing", "--temperature", "1")
    assert "--temperature: only for completing a text (--task causal-lm)." in said
