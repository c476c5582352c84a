"""How many trials train at once, and in how many hosts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune_app.run.search_config import SearchConfig
from tune_app.search.concurrency import (
    hosts_on_cpu,
    most_trials_at_once,
    runs_at_once,
    trials_at_once,
)

ROWS = SearchConfig(trials=100, batch_size=8, prompt_length=8, max_length=48)  # 448 tokens a step


@pytest.mark.parametrize(
    ("tokens_in_flight", "trials"),
    [
        (4096, 10),  # one full pack, the last trial's rows not all of them in it
        (2 * 1024, 5),
        (2 * 4096, 16),
        (100, 2),  # one computes while the other does its optimizer step
    ],
)
def test_trials_at_once_fill_what_the_hosts_compute(tokens_in_flight: int, trials: int) -> None:
    assert trials_at_once(ROWS, tokens_in_flight) == trials


@pytest.mark.parametrize(("trials", "at_once"), [(16, 5), (24, 8), (7, 2), (3, 2), (1, 1)])
def test_a_short_search_runs_fewer_so_that_suggestions_follow_results(
    trials: int, at_once: int
) -> None:
    config = SearchConfig(trials=trials)
    assert trials_at_once(config, 65536) == most_trials_at_once(config) == at_once


def test_a_confirmation_suggests_nothing_so_all_of_its_runs_train_at_once() -> None:
    config = SearchConfig()
    assert runs_at_once(config) >= 2 * config.confirm_seeds  # the best config and the default


def test_what_the_user_says_goes() -> None:
    config = SearchConfig(trials=5, concurrency=20)
    assert trials_at_once(config, 100) == runs_at_once(config) == 20
    assert most_trials_at_once(config) == 5


def test_a_population_trains_at_once() -> None:
    assert most_trials_at_once(SearchConfig(trials=30, scheduler="pbt")) == 30


@pytest.mark.parametrize(
    ("trials", "processors", "hosts"),
    [
        (24, 2, 2),  # 8 at once
        (24, 1, 1),
        (24, 64, 2),  # four trials for each
        (100, 64, 4),
        (16, 2, 1),  # 5 at once
    ],
)
def test_hosts_on_a_cpu(
    trials: int, processors: int, hosts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert hosts_on_cpu(SearchConfig(trials=trials), tmp_path) == hosts


def test_a_large_model_is_loaded_once(tmp_path: Path) -> None:
    for part in ("model-1.safetensors", "model-2.safetensors"):
        with (tmp_path / part).open("wb") as file:
            file.truncate(2**29 + 1)  # takes no space on the disk
    assert hosts_on_cpu(SearchConfig(trials=100), tmp_path) == 1
