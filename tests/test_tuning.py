"""Which trials the default scheduler stops, asked of Ray Tune's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from ray.tune.schedulers import TrialScheduler

from tune_app.searcher import METRIC
from tune_app.trial_job import trial_name
from tune_app.tuning import build_trial_scheduler


@dataclass(frozen=True)
class Trial:
    """As much of Ray's Trial as its schedulers look at."""

    trial_id: str

    def __str__(self) -> str:
        return self.trial_id


def stopped_at(scheduler: TrialScheduler, step: int, losses: dict[int, float]) -> list[int]:
    """Numbers of the trials that end at that step, reporting in the order of `losses`."""
    ended = []
    for number, loss in losses.items():
        trial = Trial(trial_name(number))
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {METRIC: loss, "step": step})
        if decision == TrialScheduler.STOP:
            ended.append(number)
    return ended


@pytest.fixture
def asha() -> TrialScheduler:
    scheduler = build_trial_scheduler("asha", steps=50)
    scheduler.set_search_properties(METRIC, "min")
    return scheduler


WORSE_AND_WORSE = {number: 1.0 + number for number in range(7)}


@pytest.mark.parametrize("step", [10, 20])
def test_asha_judges_nobody_before_three_fifths(asha: TrialScheduler, step: int) -> None:
    assert stopped_at(asha, step, WORSE_AND_WORSE) == []


def test_asha_keeps_the_better_half_at_three_fifths(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, WORSE_AND_WORSE) == [1, 2, 3, 4, 5, 6]
    # Now half of the trials are below 4.0.
    assert stopped_at(asha, 30, {7: 3.5, 8: 4.5}) == [8]


def test_asha_never_stops_the_documented_default(asha: TrialScheduler) -> None:
    assert stopped_at(asha, 30, {1: 1.0, 2: 1.1, 3: 1.2, 0: 9.0}) == [2, 3]
