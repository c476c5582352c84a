"""Training runs on a tiny model and random data, for the tests of the training loop."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tests.tiny_models import write_tiny_model
from tests.trials import NAMES, VOCAB, random_dataset
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report
from tune_app.tasks.data import Dataset, TaskData
from tune_app.tasks.known import TASKS
from tune_app.tasks.summary import summarise
from tune_app.train.loop import TrainingRun
from tune_app.train.prompt_model import PromptTunedModel


def task_data(task: str, train: Dataset, valid: Dataset, test: Dataset) -> TaskData:
    names = NAMES if task == "classification" else ()
    splits = {"train": train, "valid": valid, "test": test, "judged": valid}
    summary = summarise(TASKS[task], splits, names, None, {})
    return TaskData(TASKS[task], train, valid, valid, test, names, [], "", summary)


def random_data() -> dict[str, TaskData]:
    """Task -> random data."""
    lengths = [3 + i * 5 % 9 for i in range(14)]
    return {
        task: task_data(task, *(random_dataset(task, lengths, seed) for seed in range(3)))
        for task in ("causal-lm", "classification")
    }


def tiny_backbone(folder: Path) -> LocalBackbone:
    model = write_tiny_model("llama", folder / "tiny", vocab=VOCAB)
    return LocalBackbone(model, device="cpu", dtype="float32")


def make_run(backbone, data: TaskData, config: TrialConfig) -> TrainingRun:
    assert config.check() == []
    run = partial(run_alone, backbone)
    model = PromptTunedModel(backbone, run, data.task, data.outputs, config)
    return TrainingRun(model, data, config)


def without_time(report: Report) -> dict:
    """The report but for the wall-clock time in it."""
    return asdict(replace(report, seconds=0.0, metrics={**report.metrics, "wait_s": 0.0}))


def reports_of(run: TrainingRun, **options) -> list[dict]:
    reports: list[dict] = []
    run.train(lambda report: reports.append(without_time(report)), **options)
    return reports
