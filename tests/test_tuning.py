"""How many trials train at once."""

from __future__ import annotations

import pytest

from tune_app.config import SearchConfig
from tune_app.tuning import default_concurrency

ROWS = SearchConfig(trials=100, batch_size=8, prompt_length=8, max_length=48)  # 448 tokens a step


@pytest.mark.parametrize(
    ("tokens_in_flight", "trials"),
    [
        (4096, 10),  # one full pack, the last trial's rows not all of them in it
        (2 * 1024, 5),
        (2 * 4096, 16),  # more would suggest most of a search blindly
        (100, 2),  # one computes while the other does its optimizer step
    ],
)
def test_trials_at_once_fill_what_the_hosts_compute(tokens_in_flight: int, trials: int) -> None:
    assert default_concurrency(ROWS, tokens_in_flight) == trials


def test_no_more_trials_at_once_than_there_are() -> None:
    assert default_concurrency(SearchConfig(trials=3), 65536) == 3
