"""A task is one record: regression, and one that this file adds, with everything that uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.tiny_models import write_tiny_model
from tune_app.apply import cli as apply
from tune_app.apply.prompts_folder import read_about
from tune_app.report.results import load
from tune_app.run.run_dir import RunDir
from tune_app.search.cli import main as search
from tune_app.tasks.base import Sums
from tune_app.tasks.known import TASKS
from tune_app.tasks.regression import REGRESSION
from tune_app.train import cli as train

ONES = ["bad", "poor", "dull", "slow"]
FIVES = ["good", "fine", "fresh", "deep"]


def write_ratings(path: Path, first: int, count: int) -> Path:
    """Texts whose rating is how many of their words are good ones, from 0 to 400."""
    rows = []
    for i in range(first, first + count):
        good = i * 7 % 5
        words = [FIVES[(i + k) % 4] for k in range(good)] + [
            ONES[(i + k) % 4] for k in range(4 - good)
        ]
        rows.append({"text": f"{' '.join(words)} {i}", "stars": 100 * good})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def flags(folder: Path, task: str) -> list[str]:
    data = [
        f"--{split}={write_ratings(folder / f'{split}.csv', first, count)}"
        for split, first, count in (("train", 0, 60), ("valid", 100, 20), ("test", 200, 20))
    ]
    model = write_tiny_model("llama", folder / "tiny")
    given = ["--text-column=text", "--label-column=stars", "--backbone=local", "--quiet"]
    return [*data, *given, f"--task={task}", f"--model={model}", "--max-length=12"]


@pytest.mark.timeout(300)
def test_a_search_for_numbers_beats_their_mean_and_its_prompts_answer_in_their_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("parameters: {lr: {space: loguniform, lower: 1.0e-2, upper: 1.0e-1}}\n")
    run = RunDir(tmp_path / "run")
    short = ["--trials=3", "--steps=30", "--batch-size=8", "--confirm=1", "--confirm-seeds=1"]
    short.append("--executor=in-process")

    given = [*flags(tmp_path, "regression"), *short, f"--space={space}", f"--out={run.path}"]
    assert search(given) == 0

    results = load(run)
    assert results.metric == "r2"
    assert results.best["r2"] > 0.2  # 0 is what the mean reaches
    assert results.best["eval_loss"] < 1
    assert results.data.scale.mean == pytest.approx(200, abs=5)
    assert "r2" in capsys.readouterr().out
    about = read_about(run.prompts)
    assert about.scale == results.data.scale
    assert "r2" in about.metrics["test"]
    assert "times the score" in (run.prompts / "README.md").read_text()

    assert apply.main([str(run.path), "--evaluate", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"test: loss {about.metrics['test']['loss']:.3f}, r2 ")
    test = tmp_path / "test.csv"
    assert apply.main([str(run.path), f"--input={test}", "--text-column=text", "--quiet"]) == 0
    answers = [float(line) for line in capsys.readouterr().out.split()]
    stars = pd.read_csv(test)["stars"]
    assert len(answers) == len(stars)
    assert pd.Series(answers).corr(stars) > 0.3
    assert 50 < pd.Series(answers).mean() < 350


def _absolute_error(outputs_B1: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    errors_B = (outputs_B1.squeeze(-1).float() - labels_B).abs()
    within = float((errors_B < 0.5).sum())
    return errors_B.sum(), {"targets": len(labels_B), "within": within}


def test_a_task_of_ones_own_trains_reports_and_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings = replace(
        REGRESSION,
        name="ratings",
        loss="standard deviations",
        metric="hits",
        loss_sum=_absolute_error,
        metrics=lambda loss, sums: {"hits": sums["within"] / sums["targets"]},
        constant=None,
        petals_class="",
    )
    monkeypatch.setitem(TASKS, "ratings", ratings)
    run = RunDir(tmp_path / "run")

    assert train.main([*flags(tmp_path, "ratings"), "--steps=4", f"--out={run.path}"]) == 0

    assert "hits" in capsys.readouterr().out
    results = load(run)
    assert results.metric == "hits"
    row = results.trials.iloc[0]
    assert 0 <= row["hits"] <= 1
    assert {"hits", "test_hits"} <= set(pd.read_csv(run.trials_csv).columns)
    card = (run.prompts / "README.md").read_text()
    assert "Loss in standard deviations per row" in card
    assert "Petals" not in card
    assert apply.main([str(run.path), "--evaluate", "--quiet"]) == 0
    hits = json.loads((run.prompts / "prompts.json").read_text())["metrics"]["test"]["hits"]
    assert f"hits {hits:.4g}" in capsys.readouterr().out
