"""A run of `tune_app.train` on a tiny model and a small file, for tests of what comes after it."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import write_tiny_model
from tune_app.train import cli as train

CLASSES = ("bird", "fish", "tree")
_WORDS = {
    "bird": ["wing", "nest", "song", "feather", "sky", "egg", "beak", "crow"],
    "fish": ["fin", "water", "scale", "gill", "river", "sea", "net", "trout"],
    "tree": ["leaf", "root", "bark", "branch", "seed", "forest", "oak", "ring"],
}


def write_rows(path: Path, first: int, count: int) -> Path:
    """A csv of `count` texts of different lengths with their labels; other texts for other rows."""
    lines = ["text,label"]
    for i in range(first, first + count):
        label, words = CLASSES[i % 3], _WORDS[CLASSES[i % 3]]
        text = " ".join(words[(i * k + k) % 8] for k in range(1, 3 + i % 5))
        lines.append(f"{text} {i},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def flags(folder: Path, *, task: str = "classification", family: str = "llama") -> list[str]:
    """Flags of a quick run on a tiny model and data that are written to `folder`."""
    model = write_tiny_model(family, folder / "tiny")
    data = [
        f"--{split}={write_rows(folder / f'{split}.csv', first, count)}"
        for split, first, count in (("train", 0, 40), ("valid", 100, 12), ("test", 200, 15))
    ]
    if task == "causal-lm":
        data.append("--text-column=text")
    return [
        *data,
        f"--task={task}",
        f"--model={model}",
        "--backbone=local",
        "--prompt-length=3",
        "--batch-size=4",
        "--steps=6",
        "--max-length=12",
        "--quiet",
    ]


def train_run(
    folder: Path, *more: str, task: str = "classification", family: str = "llama"
) -> Path:
    """The run directory of a finished quick run."""
    run = folder / "run"
    config = folder / "config.yaml"
    config.write_text("trial: {lr: 0.05, warmup_steps: 2}\n")
    told = [f"--config={config}", *flags(folder, task=task, family=family), f"--out={run}", *more]
    assert train.main(told) == 0
    return run
