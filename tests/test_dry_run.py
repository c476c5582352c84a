"""`--dry-run` tells all that is known before a search, and starts nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.trained import flags
from tune_app.run.flags import parse_search_args
from tune_app.search import estimate
from tune_app.search.cli import main
from tune_app.tasks.loading import load_task_data

SEARCH = ["--steps=50", "--trials=8", "--confirm=2", "--confirm-seeds=3", "--concurrency=2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dry")
    return [*flags(folder), *SEARCH, f"--out={folder / 'run'}", "--dry-run"]


def test_all_that_is_known_is_told(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--max-length=4", "--device=cpu"]) == 0

    said = capsys.readouterr().out
    for line in (
        "  rows: 40 train, 12 valid, 15 test",
        "  columns: text is column 'text', label is column 'label'",
        "  3 classes in train: bird 14, tree 13, fish 13",
        "always answering 'bird': accuracy 0.333 on valid",
        "train texts are longer than --max-length 4 and were cut",
        "would cut only 5 %)",
        "note: the space's warmup_steps go up to 100, but a trial has only 50 steps",
        "  plus 10 confirmation runs with fresh seeds, of the best 2",
        "measured on cpu, in process, for 2 concurrent trials",
        "GB of memory",
        "Nothing has been started.",
    ):
        assert line in said, line
    out = next(word for word in given if word.startswith("--out=")).removeprefix("--out=")
    assert f"Results would be written to {out}" in said
    assert not Path(out).exists()


def test_the_estimate_counts_the_rows_that_evaluations_take() -> None:
    config = parse_search_args(["--steps", "60", "--scheduler", "asha"])
    data: Any = SimpleNamespace(judged=range(128), glimpse=16)
    assert estimate._evaluated_rows(config, data) == 2 * 128 + 3 * 16
    data.glimpse = None
    assert estimate._evaluated_rows(config, data) == 5 * 128


def test_the_estimate_grows_with_the_work_and_is_left_out_where_it_costs(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_search_args([*given, "--device=cpu"])
    model = Path(config.model)
    data = load_task_data(config, AutoTokenizer.from_pretrained(model))
    ticks = iter(range(10**6))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(ticks))  # all take 1 s

    found = estimate.estimate(config, model, data)

    assert found is not None
    assert (found.device, found.at_once) == ("cpu", 2)
    pack = 2 * 4  # rows of both trials, which take 1 s to train
    assert found.trial_s == 50 * 4 / pack + 5  # and 1 s each to be compared
    assert found.run_s == pytest.approx(50 * 4 / pack + 1 + 15 / 12)
    assert found.memory > 2**27  # torch alone
    assert estimate.estimate(replace(config, peers=("/ip4/...",)), model, data) is None
    monkeypatch.setattr(estimate, "_CHEAP", 1000)
    assert estimate.estimate(config, model, data) is None
