"""When a trial reports, and how its reports are written down."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_app.report.tables import write_tables
from tune_app.run.event_log import append
from tune_app.run.events import TrialEnded, TrialReported, TrialStarted
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import (
    EVALUATIONS,
    Report,
    Usage,
    deciding_steps,
    evaluation_steps,
    outcome,
    rows_of_a_glimpse,
)

REPORT = Report(
    step=20,
    train_loss=2.1,
    eval_loss=2.0,
    objective=2.0,
    learning_rate=1e-3,
    tokens=6400,
    seconds=3.2,
    metrics=Usage(rows=9, packs=3, pack_rows=12, pack_slots=16, wait_s=1.5).flat()
    | {"accuracy": 0.31},
)


@given(st.integers(1, 100_000))
def test_evaluations_are_even_and_the_last_step_is_one(steps):
    at = evaluation_steps(steps)
    assert len(at) == min(EVALUATIONS, steps)
    assert at[-1] == steps
    gaps = [b - a for a, b in zip([0, *at], at, strict=False)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("scheduler", "steps", "deciding"),
    [
        ("asha", 60, (36, 60)),
        ("asha", 3, (1, 3)),
        ("asha", 1, (1,)),
        ("none", 60, (60,)),
        ("median", 60, (12, 24, 36, 48, 60)),
        ("hyperband", 60, (12, 24, 36, 48, 60)),
        ("pbt", 60, (12, 24, 36, 48, 60)),
    ],
)
def test_what_the_trial_scheduler_compares_decides_and_so_does_the_end(scheduler, steps, deciding):
    assert deciding_steps(scheduler, steps) == deciding


def test_evaluations_of_a_default_trial_cost_a_quarter_of_it_at_most():
    config = SearchConfig()
    evaluations, deciding = (
        evaluation_steps(config.steps),
        deciding_steps(config.scheduler, config.steps),
    )
    rows = sum(
        config.eval_rows if step in deciding else rows_of_a_glimpse(config.eval_rows)
        for step in evaluations
    )
    trained = config.steps * config.batch_size
    # Forward and backward pass of a training row cost two forward passes at least.
    assert rows / (2 * trained + rows) <= 0.25
    assert [rows_of_a_glimpse(n) for n in (9, 128, 1000, 5000)] == [9, 16, 125, 128]


def test_a_flat_report_has_metric_and_usage_beside_the_rest():
    flat = REPORT.flat()
    assert flat["accuracy"] == 0.31
    assert flat["occupancy"] == 0.75
    assert flat.keys() == ({*vars(REPORT), *REPORT.metrics} - {"metrics"})
    json.dumps(flat)


def test_a_report_comes_back_from_what_was_written_whoever_wrote_it():
    assert Report.from_flat(REPORT.flat()) == REPORT
    flat = REPORT.flat()
    nested = {"metric": {"accuracy": flat.pop("accuracy")}, "usage": {"rows": flat.pop("rows")}}
    assert Report.from_flat(flat | nested) == REPORT  # as in checkpoints of before
    short = Report.from_flat({"step": 4, "eval_loss": None, "unheard_of": 3.0})
    assert math.isnan(short.eval_loss)
    assert (short.step, short.tokens, short.metrics) == (4, 0, {"unheard_of": 3.0})
    with pytest.raises(TypeError, match="a report has a step"):
        Report.from_flat({"eval_loss": 2.0})


@dataclass(frozen=True)
class Measured(Report):
    """A report with a figure more, as somebody may add one."""

    gradient_norm: float = 0.0


def test_a_new_figure_is_in_the_tables_without_anybody_naming_it(tmp_path: Path):
    run = RunDir(tmp_path).create()
    append(run, TrialStarted(trial=3, config=TrialConfig(steps=20)))
    report = Measured(step=20, eval_loss=2.0, gradient_norm=0.7, metrics={"accuracy": 0.4})
    append(run, TrialReported(trial=3, report=report))
    append(run, TrialEnded(trial=3, status=Status.FINISHED))
    write_tables(run)

    for table in (run.history_csv, run.trials_csv):
        (row,) = pd.read_csv(table).to_dict("records")
        assert (row["trial"], row["gradient_norm"], row["accuracy"]) == (3, 0.7, 0.4)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (REPORT, Status.FINISHED),
        (replace(REPORT, step=12), Status.STOPPED),
        (replace(REPORT, diverged=True, eval_loss=math.nan), Status.DIVERGED),
        (None, Status.STOPPED),
    ],
)
def test_how_a_trial_ended(last, status):
    assert outcome(last, steps=20)[0] == status
