"""When a trial reports, and how its reports are written down."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_app.run.run_dir import Status
from tune_app.run.trial_report import EVALUATIONS, Report, Usage, evaluation_steps, kept, outcome

REPORT = Report(
    step=20,
    train_loss=2.1,
    eval_loss=2.0,
    objective=2.0,
    learning_rate=1e-3,
    tokens=6400,
    seconds=3.2,
    metric={"accuracy": 0.31},
    usage=Usage(rows=9, packs=3, pack_rows=12, pack_slots=16, wait_s=1.5).flat(),
)


@given(st.integers(1, 100_000))
def test_evaluations_are_even_and_the_last_step_is_one(steps):
    at = evaluation_steps(steps)
    assert len(at) == min(EVALUATIONS, steps)
    assert at[-1] == steps
    gaps = [b - a for a, b in zip([0, *at], at, strict=False)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_a_flat_report_has_metric_and_usage_beside_the_rest():
    flat = REPORT.flat()
    assert flat["accuracy"] == 0.31
    assert flat["occupancy"] == 0.75
    assert flat.keys() == ({*vars(REPORT), *REPORT.metric, *REPORT.usage} - {"metric", "usage"})
    json.dumps(flat)


def test_events_keep_all_of_a_report_and_nothing_of_ray():
    flat = REPORT.flat() | {"test_loss": 2.2, "test_accuracy": 0.3}
    assert kept(flat | {"training_iteration": 1, "time_total_s": 4.0}) == flat


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (REPORT.flat(), Status.FINISHED),
        (REPORT.flat() | {"step": 12}, Status.STOPPED),
        (REPORT.flat() | {"diverged": True, "eval_loss": math.nan}, Status.DIVERGED),
        ({}, Status.STOPPED),
    ],
)
def test_how_a_trial_ended(last, status):
    assert outcome(last, steps=20)[0] == status
