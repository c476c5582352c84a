"""Numbers, spreads and amounts as the terminal and the page say them."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from tune_app.report.words import DASH, count, duration, number, with_spread


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (0.012, "lr", "1.2e-2"),
        (0.001, "lr", "1e-3"),
        (0, "weight_decay", "0"),
        (0, "accuracy", "0.000"),
        (1.7421, "eval_loss", "1.742"),
        (16.9, "eval_loss", "16.900"),
        (math.nan, "eval_loss", "\N{EN DASH}"),
        (None, "num_cycles", "\N{EN DASH}"),
        (pd.NA, "step", "\N{EN DASH}"),
        (4.0, "num_cycles", "4"),
        (0.5, "num_cycles", "0.5"),
        (True, "amsgrad", "yes"),
        (78.1234, "perplexity", "78.12"),
        ("cosine", "scheduler", "cosine"),
    ],
)
def test_numbers_read_well(value: object, name: str, text: str):
    assert number(value, name) == text


def test_a_spread_has_the_digits_of_its_mean():
    assert with_spread(2.0642, 4.6e-4) == "2.064 ± 0.000"
    assert with_spread(2.0642, math.nan) == "2.064"
    assert with_spread(math.nan, math.nan) == DASH


def test_amounts_read_well():
    assert [count(n) for n in (940, 12_340, 4_100_000)] == ["940", "12.3 k", "4.1 M"]
    assert [duration(s) for s in (8.44, 185, 8040)] == ["8.4 s", "3 min 5 s", "2 h 14 min"]
