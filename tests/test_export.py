"""Which weights a run exports, and what is saved with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.trained import CLASSES, train_run
from tune_app.apply.export import export_best
from tune_app.apply.prompts_folder import read_about, read_weights
from tune_app.report.page.page import report_page
from tune_app.report.results import load
from tune_app.report.summary import summary
from tune_app.report.words import exported
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("trained")
    return RunDir(train_run(folder, "--tuning-mode=deep_ptune"))


def _searched(tmp_path, trials: dict[int, tuple]) -> RunDir:
    """A run with trials {number: (eval_loss, test_loss, of, status)}; each one's weights are its
    number."""
    run = RunDir(tmp_path / "run").create()
    run.write_atomic(run.search_yaml, SearchConfig(prompt_length=2).to_yaml())
    about = {"classes": CLASSES, "fingerprint": "f" * 64, "task": "classification"}
    run.append_event({"event": "search_started", "metric": "accuracy", **about})
    for number, (eval_loss, test_loss, of, status) in trials.items():
        config = replace(TrialConfig(), prompt_length=2, seed=number).to_dict()
        origin = {"origin": "suggested"} if of is None else {"origin": "confirm", "of": of}
        run.append_event({"event": "trial_started", "trial": number, "config": config, **origin})
        figures = {"step": 100, "eval_loss": eval_loss, "train_loss": 1.0, "accuracy": 0.5}
        if test_loss is not None:
            figures |= {"test_loss": test_loss, "test_accuracy": 0.25}
        run.append_event({"event": "report", "trial": number, **figures})
        run.append_event({"event": "trial_ended", "trial": number, "status": status})
        folder = run.checkpoint(number)
        folder.mkdir(parents=True)
        weights = {
            "prompt_embeddings": torch.full((2, 128), float(number)),
            "score": torch.full((3, 128), float(number)),
        }
        torch.save({"model": weights, "step": 100}, folder / "state.pt")
    run.append_event({"event": "search_ended", "reason": "all trials are done"})
    return run


def test_the_folder_says_what_it_holds(run):
    about = read_about(run.prompts)
    row = load(run).best
    assert (about.task, about.class_names, about.max_length) == ("classification", CLASSES, 12)
    assert (about.config.tuning_mode, about.config.prompt_length) == ("deep_ptune", 3)
    assert about.config.lr == 0.05
    metrics = ("accuracy", "f1")
    assert about.metrics["valid"] == {"loss": row["eval_loss"]} | {m: row[m] for m in metrics}
    assert about.metrics["test"] == {name: row[f"test_{name}"] for name in ("loss", *metrics)}
    assert (about.model.family, about.model.hidden_size, about.model.num_blocks) == ("llama", 32, 2)
    assert about.data_fingerprint == run.events()[0]["fingerprint"]
    assert about.search_config().train.endswith("train.csv")


def test_it_does_without_torch(run):
    """Its import would be what a search ends with."""
    program = "import sys; from tune_app.apply.export import export_best as export, RunDir; "
    program += "print(export(RunDir(sys.argv[1]))); sys.exit('torch' in sys.modules)"
    before = read_weights(run.prompts)
    said = subprocess.check_output([sys.executable, "-c", program, run.path], text=True)
    assert said.strip() == str(run.prompts)
    torch.testing.assert_close(read_weights(run.prompts), before, rtol=0, atol=0)


@pytest.mark.parametrize("harm", ["cut", "changed", "compressed"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, harm):
    copy = RunDir(shutil.copytree(run.path, tmp_path / "run"))
    file = copy.checkpoint(1) / "state.pt"
    content = file.read_bytes()
    if harm == "compressed":  # might unpack without end
        with zipfile.ZipFile(file) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, entry in entries.items():
                new.writestr(name, entry)
    elif harm == "cut":
        file.write_bytes(content[:-30])
    else:
        at = content.index(b"weights.safetensors") + 100
        file.write_bytes(content[:at] + b"?" + content[at + 1 :])
    with pytest.raises(ConfigError, match=r"state\.pt: cannot be read"):
        export_best(copy)


def test_weights_are_those_of_the_checkpoint_under_petals_names(run):
    weights = load_file(run.prompts / "prompts.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {
        "prompt_embeddings": (3, 32),
        "intermediate_prompt_embeddings": (3, 2 * 32),
        "score": (3, 32),
    }
    saved = run.checkpoint(1) / "state.pt"
    state = torch.load(saved, weights_only=True, map_location="cpu")["model"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[name])
    with safe_open(run.prompts / "prompts.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["tuning_mode"] == "deep_ptune"
    assert json.loads(metadata["class_names"]) == list(CLASSES)


def test_the_confirmed_winner_by_validation_loss(tmp_path):
    """Trial 2 won the search, trial 1 the confirmation, which goes by validation loss too; of
    trial 1's runs, 12 has the best test loss and 11 the best validation loss."""
    run = _searched(
        tmp_path,
        {
            0: (2.0, None, None, "finished"),
            1: (1.8, None, None, "finished"),
            2: (1.5, None, None, "finished"),
            10: (2.0, 2.0, 0, "finished"),
            20: (2.0, 2.1, 0, "finished"),
            11: (1.7, 1.9, 1, "finished"),
            12: (1.8, 1.2, 1, "finished"),
            13: (0.1, None, 1, "diverged"),
            21: (1.9, 1.5, 2, "finished"),
            22: (1.9, 1.5, 2, "finished"),
        },
    )
    about = read_about(export_best(run))
    assert (about.trial, about.trained_as, about.config.seed) == (1, 11, 11)
    assert about.metrics == {
        "valid": {"loss": 1.7, "accuracy": 0.5},
        "test": {"loss": 1.9, "accuracy": 0.25},
    }
    assert read_weights(run.prompts)["score"].unique().tolist() == [11.0]
    made = "confirmation run 11 of trial 1, seed 11"
    assert f"These weights are from {made}." in (run.prompts / "README.md").read_text()
    said = f"Exported prompts: test loss 1.900, accuracy 0.250 ({made})."
    assert exported(load(run)) == said  # the verdict's mean test loss is 1.55
    assert said in report_page(load(run))
    assert said in summary(load(run))


def test_without_confirmation_the_best_finished_trial(tmp_path):
    run = _searched(
        tmp_path,
        {
            0: (2.0, None, None, "finished"),
            1: (1.9, None, None, "finished"),
            2: (1.1, None, None, "stopped"),
        },
    )
    about = read_about(export_best(run))
    assert (about.trial, about.trained_as) == (1, 1)
    assert list(about.metrics) == ["valid"]
    said = "Exported prompts: validation loss 1.900, accuracy 0.500 (trial 1, seed 1)."
    assert exported(load(run)) == said
    assert read_weights(run.prompts)["score"].unique().tolist() == [1.0]


def test_nothing_to_export(tmp_path):
    run = _searched(tmp_path, {0: (2.0, None, None, "diverged")})
    assert export_best(run) is None
    assert not run.prompts.exists()
    assert exported(load(run)) == ""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "prompts.json").unlink(), "prompts.json is missing"),
        (lambda folder: (folder / "prompts.safetensors").unlink(), "prompts.safetensors is missi"),
        (lambda folder: (folder / "prompts.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "prompts.json").write_text("{}"), "not written by tune_app"),
        (lambda folder: (folder / "prompts.safetensors").write_bytes(b"x"), "does not belong to"),
    ],
)
def test_torn_folders_are_refused(tmp_path, spoil, message):
    folder = export_best(_searched(tmp_path, {0: (2.0, None, None, "finished")}))
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        read_about(folder)
