"""How sure an answer is: intervals, levels, and the numbers they are made of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tune_app.report.evidence import LEVEL, interval, level_of, next_look, pairs_needed
from tune_app.run import test_rows
from tune_app.tasks.objectives import OBJECTIVES, always_the_most_frequent, macro_f1


def test_the_interval_of_pairs_is_students():
    from scipy import stats

    gaps = np.array([-0.09, -0.1, -0.12])
    found = interval(gaps, None, 0.05)
    low, high = stats.t.interval(0.95, 2, loc=gaps.mean(), scale=stats.sem(gaps))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_all_looks_together_spend_the_level():
    assert sum(level_of(look) for look in range(1, 60)) == pytest.approx(LEVEL)
    assert [next_look(n, 96) for n in (0, 3, 6, 12, 96)] == [3, 6, 12, 24, 96]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 3.0])  # the seeds' part of the deviation
@pytest.mark.parametrize("seeds", [3, 6])
def test_the_interval_misses_no_more_often_than_it_says(seeds: int, share: float):
    """Whatever part seeds and rows have, and with noise of each row and seed on top."""
    generator = np.random.default_rng(seeds)
    rows, runs, misses, level = 100, 1500, 0, 0.05
    for _ in range(runs):
        both = 0.3 * generator.standard_normal((seeds, rows)) + generator.standard_normal(rows)
        both += share * 0.1 * math.sqrt(seeds) * generator.standard_normal((seeds, 1))
        found = interval(both.mean(1), both, level)
        misses += not found.low < 0 < found.high
    # 1,500 draws at exactly 5 % come to 7 % or more once in 2,000 times.
    assert misses / runs < 0.07


def test_pseudo_values_of_a_mean_are_the_rows_and_of_f1_its_standard_error():
    losses = [0.5, 1.5, 4.0]
    rows = [{"loss": loss, "targets": 1} for loss in losses]
    assert test_rows.pseudo_values(rows, OBJECTIVES["loss"].value) == pytest.approx(losses)

    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, 400)
    answers = np.where(generator.random(400) < 0.7, labels, generator.integers(0, 3, 400))

    def entry(label: int, answer: int) -> dict[str, float]:
        hit = {f"hit {label}": 1} if label == answer else {}
        return {f"label {label}": 1, f"answer {answer}": 1, **hit}

    rows = [entry(*pair) for pair in zip(labels, answers, strict=True)]
    values = test_rows.pseudo_values(rows, macro_f1)
    again = [
        macro_f1(_total([rows[i] for i in generator.integers(0, 400, 400)])) for _ in range(400)
    ]
    assert values.mean() == pytest.approx(macro_f1(_total(rows)), abs=0.002)
    assert values.std(ddof=1) / 20 == pytest.approx(np.std(again), rel=0.15)  # the bootstrap's


def _total(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: sum(row.get(name, 0) for row in rows) for name in {n for row in rows for n in row}
    }


def test_test_rows_survive_their_file_and_a_broken_one_is_none(tmp_path: Path):
    rows = [{"loss": 0.5, "targets": 1, "label 3": 1}, {"loss": 0.25, "targets": 1}]
    file = tmp_path / "rows.npz"
    file.write_bytes(test_rows.packed(rows))
    assert test_rows.read(file) == rows
    for content in (b"", b"PK\x03\x04 cut off", file.read_bytes()[:-30]):
        file.write_bytes(content)
        assert test_rows.read(file) is None
    assert test_rows.read(tmp_path / "none") is None


def test_macro_f1_is_that_of_scikit_learn():
    # f1_score([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], average="macro") = (0.5 + 0.8 + 0) / 3
    sums = {"label 0": 2, "label 1": 2, "label 2": 1, "answer 0": 2, "answer 1": 3}
    assert macro_f1(sums | {"hit 0": 1, "hit 1": 2}) == pytest.approx(1.3 / 3)


def test_what_naming_the_most_frequent_class_reaches():
    found = always_the_most_frequent([30, 10], [15, 5])
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found["f1"] == pytest.approx((2 * 15 / 35) / 2)


def test_how_many_seeds_it_would_take():
    found = interval(np.array([-0.2, -0.1, 0.0]), None, level_of(1))
    assert found.high > 0
    needed = pairs_needed(found, 3, 1, 0.11, 96)
    assert (
        needed == 12
    )  # 0.1 * t(0.9975, 11) / sqrt(12) = 0.101; at 6, 0.1 * t(0.99, 5) / sqrt(6) = 0.137
    assert pairs_needed(found, 3, 1, 0.001, 96) is None
