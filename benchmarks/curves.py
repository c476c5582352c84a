"""Learning curves on several tasks, trained once and kept: what benchmarks.held_out searches over.

    python -m benchmarks.curves [--smollm2 FOLDER] [TASK ...]

Tasks, all from what Python itself carries:

    kind       docstring -> module, class, function or method
    code       ten lines of source code -> which of eight packages they are from
    size       docstring -> the logarithm of the number of lines that it documents (regression)
    topics     paragraphs of the language reference (causal-lm, no labels)
    deep       docstring -> package, with deep prompts
    smollm2    docstring -> package, SmolLM2-135M in place of the demo model; fewer and shorter runs
    raises     docstring -> whether the function has a raise statement: to tune rules on
    arguments  docstring -> the logarithm of one more than the number of arguments (regression)
    source     ten lines of source code (causal-lm, no labels)

The last two were recorded when the sampler gp was finished, to check it.

Every config of a grid is trained, and at every fifth of the run its loss kept: over all validation
rows that trials are compared on, over the first 16, 32 and 64 of them, and with the mean of the
prompts over the last fifth in place of the last ones. A second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
import math
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tune_app.models.folder import model_folder
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.tasks.stdlib_text import PACKAGES

FILE = Path(__file__).parent / "results" / "held_out_curves.csv"
PARTS = (16, 32, 64)  # rows
_AT_ONCE = 4
_MOST_ROWS = 4000  # of a task

Key = tuple[float, str, int]  # lr, scheduler, warmup_steps


@dataclass(frozen=True)
class CurveTask:
    """What is trained, and the grid: each lr with each schedule and each warmup."""

    settings: dict[str, Any] = field(default_factory=dict)  # of SearchConfig
    rows: Any = None  # () -> (text, label) pairs; None: the built-in text
    model: str = "demo"
    lrs: tuple[float, ...] = tuple(round(10 ** (i / 3), 8) for i in range(-12, -2))
    schedulers: tuple[str, ...] = ("linear", "constant_with_warmup")
    warmups: tuple[int, ...] = (0, 20)
    steps: int = 50
    batch_size: int = 8

    @property
    def default(self) -> TrialConfig:
        return SearchConfig(steps=self.steps, batch_size=self.batch_size).base_trial()

    def grid(self) -> list[Key]:
        """The grid in a random order, so that an early end leaves a random part of it; the
        documented default first."""
        grid = list(itertools.product(self.lrs, self.schedulers, self.warmups))
        random.Random(0).shuffle(grid)
        first = (self.default.lr, self.default.scheduler, self.default.num_warmup_steps())
        return list(dict.fromkeys([first, *grid]))


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    step: int
    tokens: int
    train_loss: float
    loss: float  # what the search minimises; a diverged trial has its penalty
    averaged: float  # NaN where it was not measured
    parts: tuple[float, ...]  # over the first PARTS rows


def _nodes(packages: tuple[str, ...] | None) -> Iterator[tuple[ast.AST, str, str, str]]:
    """(node, its docstring, what it is, package) over the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in packages or (None,):
        for file in sorted((stdlib / (package or "")).rglob("*.py")):
            parts = file.relative_to(stdlib).parts
            if {"site-packages", "test", "tests", "idle_test"} & set(parts):
                continue
            try:
                tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            methods = {
                id(child)
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for child in node.body
            }
            for node in ast.walk(tree):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
                if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                    kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
                    kind = "method" if id(node) in methods and kind == "function" else kind
                    yield node, " ".join(text.split()), kind, parts[0]


def kinds() -> list[tuple[str, str]]:
    """As many of each kind as there are of the rarest."""
    by_kind: dict[str, list[str]] = {}
    for _, text, kind, _ in _nodes(None):
        if len(text) >= 20:
            by_kind.setdefault(kind, []).append(text)
    least = min(len(texts) for texts in by_kind.values())
    return [
        (text, kind)
        for kind, texts in by_kind.items()
        for text in random.Random(1).sample(sorted(set(texts)), min(least, len(set(texts))))
    ]


def code() -> list[tuple[str, str]]:
    stdlib, rows = Path(sysconfig.get_paths()["stdlib"]), []
    for package in PACKAGES:
        for file in sorted((stdlib / package).rglob("*.py")):
            lines = [line.strip() for line in file.read_text("utf-8", "replace").splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
            starts = range(0, len(lines) - 9, 10)
            rows += [(" ".join(lines[i : i + 10]), package) for i in starts]
    return rows


def sizes() -> list[tuple[str, float]]:
    return [
        (text, round(math.log(node.end_lineno - node.lineno + 1), 3))
        for node, text, kind, _ in _nodes(None)
        if kind != "module" and len(text) >= 20
    ]


def raises() -> list[tuple[str, str]]:
    """As many of either answer."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, list[str]] = {"yes": [], "no": []}
    for node, text, _, _ in _nodes(None):
        if isinstance(node, functions) and len(text) >= 20:
            raising = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            found["yes" if raising else "no"].append(text)
    least = min(map(len, found.values()))
    return [
        (text, answer)
        for answer, texts in found.items()
        for text in random.Random(1).sample(texts, least)
    ]


def arguments() -> list[tuple[str, float]]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (text, round(math.log1p(len(node.args.args) + len(node.args.kwonlyargs)), 3))
        for node, text, _, _ in _nodes(None)
        if isinstance(node, functions) and len(text) >= 20
    ]


_CSV = {"text_column": "text", "label_column": "label"}
TASKS = {
    "kind": CurveTask(_CSV, kinds),
    "code": CurveTask(_CSV, code),
    "size": CurveTask({**_CSV, "task": "regression"}, sizes),
    "topics": CurveTask({"task": "causal-lm"}),
    "deep": CurveTask({"tuning_mode": "deep_ptune"}),
    "raises": CurveTask(_CSV, raises),
    "arguments": CurveTask({**_CSV, "task": "regression"}, arguments),
    "source": CurveTask({"text_column": "text", "task": "causal-lm"}, code),
    "smollm2": CurveTask(
        {"max_length": 20, "eval_rows": 48, "dtype": "bfloat16"},
        model="smollm2",
        lrs=tuple(round(10 ** (i / 2), 8) for i in range(-7, -1)),
        schedulers=("linear", "constant_with_warmup"),
        warmups=(0, 10),
        steps=30,
        batch_size=4,
    ),
}
HELD_OUT = tuple(name for name in TASKS if name != "raises")  # no rule was tuned on these


def read(file: Path = FILE) -> dict[str, dict[Key, list[Point]]]:
    """Task -> config -> its curve."""
    curves: dict[str, dict[Key, list[Point]]] = {}
    if not file.exists():
        return curves
    for row in csv.DictReader(file.open()):
        key = (float(row["lr"]), row["scheduler"], int(row["warmup_steps"]))
        parts = tuple(float(row[f"loss_{rows}"]) for rows in PARTS)
        point = Point(
            int(row["step"]),
            int(row["tokens"]),
            float(row["train_loss"]),
            float(row["loss"]),
            float(row["averaged"]),
            parts,
        )
        curves.setdefault(row["task"], {}).setdefault(key, []).append(point)
    return curves


class Recorder:
    """Trains the configs of one task on one backbone, some at once, in shared packs."""

    def __init__(self, name: str, smollm2: str | None) -> None:
        from transformers import AutoTokenizer

        from tune_app.backbones.local import LocalBackbone
        from tune_app.backbones.packer import Packer
        from tune_app.tasks.loading import load_task_data

        self.name, self.task = name, TASKS[name]
        folder = str(model_folder("demo")) if self.task.model == "demo" else str(smollm2)
        config = SearchConfig(**self.task.settings)
        with tempfile.TemporaryDirectory() as scratch:
            if self.task.rows is not None:
                rows = sorted(set(self.task.rows()))
                rows = random.Random(2).sample(rows, min(_MOST_ROWS, len(rows)))
                file = Path(scratch) / "rows.csv"
                pd.DataFrame(rows, columns=["text", "label"]).to_csv(file, index=False)
                config = SearchConfig(**self.task.settings, train=str(file))
            self.data = load_task_data(config, AutoTokenizer.from_pretrained(folder))
        self.mode = config.tuning_mode
        self.packer = Packer(LocalBackbone(folder, device="cpu", dtype=config.dtype))

    def train(self, key: Key) -> tuple[Key, list[Point]]:
        from tune_app.train.loop import EVALUATION_ROWS, TrainingRun, evaluation_batches
        from tune_app.train.prompt_model import PromptTunedModel

        config = TrialConfig(
            lr=key[0],
            scheduler=key[1],
            warmup_steps=key[2],
            steps=self.task.steps,
            batch_size=self.task.batch_size,
            tuning_mode=self.mode,
        )
        points: list[Point] = []
        seen: list[dict[str, float]] = []  # rows of the last evaluation
        since: list[list[Any]] = []  # the parameters after each step since the last evaluation

        class Model(PromptTunedModel):
            def evaluate(self, batches: Any, rows: Any = None) -> Any:
                seen.clear()
                return super().evaluate(batches, seen)

        class Run(TrainingRun):
            def _train_step(self, batch: Any) -> float:
                loss = super()._train_step(batch)
                since.append([p.detach().clone() for p in self.model.parameters()])
                return loss

        with self.packer.member():
            model = Model(
                self.packer.backbone, self.packer.run, self.data.task, self.data.outputs, config
            )
            run = Run(model, self.data, config)
            valid = evaluation_batches(self.data.judged, EVALUATION_ROWS)

            def report(report: Any) -> None:
                parts = []
                for part in PARTS:
                    targets = sum(row["targets"] for row in seen[:part])
                    parts.append(sum(row["loss"] for row in seen[:part]) / targets)
                averaged = math.nan
                last = [p.detach().clone() for p in model.parameters()]
                if not report.diverged and report.step * 5 // config.steps in (2, 5):
                    for p, *values in zip(model.parameters(), *since, strict=True):
                        p.data = sum(values) / len(values)
                    averaged = model.evaluate(valid).loss
                    for p, value in zip(model.parameters(), last, strict=True):
                        p.data = value
                since.clear()
                points.append(
                    Point(
                        report.step,
                        report.tokens,
                        report.train_loss,
                        report.objective,
                        averaged,
                        tuple(parts),
                    )
                )

            run.train(report)
        return key, points

    def close(self) -> None:
        self.packer.close()


def append(name: str, key: Key, points: list[Point]) -> None:
    is_new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            figures = ["step", "tokens", "train_loss", "loss", "averaged"]
            parts = [f"loss_{rows}" for rows in PARTS]
            writer.writerow(["task", "lr", "scheduler", "warmup_steps", *figures, *parts])
        for p in points:
            losses = (p.train_loss, p.loss, p.averaged, *p.parts)
            writer.writerow([name, *key, p.step, p.tokens, *(f"{loss:.5f}" for loss in losses)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; without any, all")
    parser.add_argument("--smollm2", help="folder of SmolLM2, as benchmarks.real_model makes it")
    args = parser.parse_args()
    names = args.tasks or [name for name in TASKS if name != "smollm2" or args.smollm2]
    for name in names:
        known = read().get(name, {})
        missing = [key for key in TASKS[name].grid() if key not in known]
        if not missing:
            continue
        recorder = Recorder(name, args.smollm2)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done, (key, points) in enumerate(pool.map(recorder.train, missing), 1):
                append(name, key, points)
                if done % 10 == 0 or done == len(missing):
                    print(f"{name}: {done} of {len(missing)} configs", flush=True)
        recorder.close()


if __name__ == "__main__":
    main()
