"""One config trained alone: the losses of the trial, the run it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.trained import flags, train_run
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import Packer
from tune_app.report.results import load
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.tasks.loading import load_task_data
from tune_app.train import cli as train
from tune_app.train.loop import TrainingRun
from tune_app.train.prompt_model import PromptTunedModel


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A packer leaves each thread but its own one of torch's, and so sums in another order."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return RunDir(train_run(tmp_path_factory.mktemp("trained")))


def _packed_losses(run: RunDir, others: list[TrialConfig]) -> list[tuple[float, float]]:
    """(train, eval) losses of the run's config as a trial that shares its packs with others."""
    config = SearchConfig.from_yaml(run.search_yaml)
    data = load_task_data(config, AutoTokenizer.from_pretrained(config.model))
    packer = Packer(LocalBackbone(config.model, device="cpu", dtype=config.dtype))
    reports = []

    def run_trial(trial: TrialConfig, report) -> None:
        with packer.member():
            model = PromptTunedModel(
                packer.backbone, packer.run, data.task, data.outputs, trial, data.start
            )
            TrainingRun(model, data, trial).train(report)

    trial = TrialConfig.from_dict(config.trial)
    with ThreadPoolExecutor(len(others) + 1) as threads:
        jobs = [threads.submit(run_trial, other, lambda report: None) for other in others]
        jobs.append(threads.submit(run_trial, trial, reports.append))
        for job in jobs:
            job.result()
    packer.close()
    assert packer.counters.packs < 4 * (6 + 5)  # they did share
    return [(report.train_loss, report.eval_loss) for report in reports]


def test_same_losses_as_the_trial_in_its_packs(run):
    trial = TrialConfig.from_dict(load(run).configs[1])
    others = [
        replace(trial, lr=lr, seed=seed, prompt_length=length)
        for lr, seed, length in [(1e-3, 5, 3), (0.1, 6, 7), (0.2, 7, 1)]
    ]
    history = load(run).history
    alone = list(zip(history["train_loss"], history["eval_loss"], strict=True))

    # float32, summed in another order: 1e-5 is the tolerance that docs/prompts.md names
    assert _packed_losses(run, others) == [pytest.approx(losses, rel=1e-5) for losses in alone]
    assert len(alone) == 5


def test_leaves_a_run_like_any_other(run):
    results = load(run)
    assert [int(trial) for trial in results.trials["trial"]] == [1]
    row = results.best
    assert row["status"] == Status.FINISHED
    assert row["step"] == 6
    assert row["lr"] == 0.05
    assert row["test_loss"] > 0
    assert (run.prompts / "prompts.safetensors").is_file()
    assert SearchConfig.from_yaml(run.best_yaml).trial == results.configs[1]


def test_trains_again_from_its_own_best_yaml(run, tmp_path):
    again = RunDir(tmp_path / "again")
    assert train.main([f"--config={run.best_yaml}", f"--out={again.path}", "--quiet"]) == 0
    columns = ["step", "train_loss", "eval_loss", "learning_rate"]
    assert load(again).history[columns].equals(load(run).history[columns])


def test_flags_win_over_the_config_of_the_file(run):
    config, trial = train.parse_train_args(
        [f"--config={run.best_yaml}", "--steps=9", "--seed", "4", "--dtype=bfloat16"]
    )
    assert (trial.steps, trial.seed, trial.lr, trial.prompt_length) == (9, 4, 0.05, 3)
    assert config.dtype == "bfloat16"


def test_mistakes_are_told_together_and_nothing_starts(tmp_path, capsys):
    out = tmp_path / "out"
    told = ["--steps=many", "--trials=9", "--modle=demo", f"--out={out}", "--sampler", "tpe"]
    assert train.main(told) == 2
    said = capsys.readouterr().err
    assert "--trials: only for a search" in said
    assert "--sampler: only for a search" in said
    assert "--steps: must be a whole number, got 'many'" in said
    assert "Did you mean '--model'?" in said
    assert "Traceback" not in said
    assert not out.exists()


def test_a_folder_with_another_run_is_refused(run, capsys):
    assert train.main([f"--config={run.best_yaml}", f"--out={run.path}"]) == 2
    assert "already contains a run" in capsys.readouterr().err


def test_a_space_that_is_gone_does_not_matter(run, tmp_path):
    """best.yaml names the search's space file, and train needs none."""
    config = tmp_path / "best.yaml"
    config.write_text(run.best_yaml.read_text().replace("space: default", "space: gone.yaml"))
    assert "gone.yaml" in config.read_text()
    assert train.main([f"--config={config}", f"--out={tmp_path / 'out'}", "--quiet"]) == 0


def test_divergence_is_told_and_nothing_exported(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("trial: {lr: 1.0e+9, warmup_steps: 0, steps: 6}\n")
    out = tmp_path / "run"
    assert train.main([f"--config={config}", *flags(tmp_path), f"--out={out}"]) == 1
    assert "exploded or was not finite" in capsys.readouterr().err
    assert load(RunDir(out)).trials["status"].tolist() == [Status.DIVERGED]
    assert not RunDir(out).prompts.exists()


def _wait_until_it_trains(out: Path, over: Callable[[], bool]) -> None:
    while not over() and "trial_started" not in _kinds(out):
        time.sleep(0.05)


def _check_it_was_interrupted(out: Path, code: int, said: str) -> None:
    assert code == 130
    assert "Traceback" not in said
    assert "interrupted" in said
    assert _kinds(out)[-1] == "search_ended"
    assert load(RunDir(out)).trials["status"].tolist() == [Status.INTERRUPTED]


def test_ctrl_c_ends_it_cleanly(tmp_path, capsys):
    """In this process; what ends as a process is the next test's."""
    out, over = tmp_path / "run", threading.Event()

    def interrupt() -> None:
        _wait_until_it_trains(out, over.is_set)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # A Tuner of another test may have left its own, which only notes a first Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        code = train.main([*flags(tmp_path), f"--out={out}", "--steps=100000"])
    except KeyboardInterrupt:  # would end all tests
        pytest.fail("Ctrl-C came through")
    finally:
        signal.signal(signal.SIGINT, before)
    over.set()
    thread.join()
    _check_it_was_interrupted(out, code, capsys.readouterr().err)


@pytest.mark.slow
def test_ctrl_c_ends_the_command_cleanly(tmp_path):
    out = tmp_path / "run"
    told = [*flags(tmp_path), f"--out={out}", "--steps=100000"]
    command = [sys.executable, "-m", "tune_app.train", *told]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _wait_until_it_trains(out, lambda: process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    _check_it_was_interrupted(out, process.returncode, said)


def _kinds(run: Path) -> list[str]:
    events = run / "events.jsonl"
    return [json.loads(line)["event"] for line in events.open()] if events.is_file() else []
