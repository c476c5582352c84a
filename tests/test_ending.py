"""What ends a search early, without any search: budgets, signals, dead machines."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tune_app.run.events import TrialReported, TrialRetried
from tune_app.run.run_state import RunState
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import Report
from tune_app.search.stop_conditions import StopConditions, interruptible


def report(trial: int, step: int, tokens: int = 0) -> TrialReported:
    return TrialReported(trial=trial, report=Report(step=step, tokens=tokens))


def failure(trial: int, *, machines: bool) -> TrialRetried:
    return TrialRetried(trial=trial, reason="gone", machines=machines)


def test_token_budget_counts_the_whole_run() -> None:
    ending = StopConditions(SearchConfig(token_budget=1000))
    ending.begin(RunState.of([report(0, 5, tokens=200), report(0, 10, tokens=400)]))
    ending.listen(report(1, 5, tokens=500))
    assert not ending()
    ending.listen(report(2, 5, tokens=100))

    assert ending()
    assert (ending.reason, ending.urgent, ending.exit_code) == (
        "the token budget is spent",
        False,
        0,
    )


def test_time_budget_runs_from_the_first_trial() -> None:
    ending = StopConditions(SearchConfig(time_budget=0.05))
    time.sleep(0.1)
    assert not ending()
    ending.begin(RunState())
    time.sleep(0.1)

    assert ending()
    assert not ending.urgent


def test_machines_are_dead_where_a_trial_fails_again_and_none_gets_on() -> None:
    ending = StopConditions(SearchConfig())
    ending.listen(report(0, 5))
    ending.listen(failure(0, machines=True))
    ending.listen(failure(1, machines=True))
    ending.listen(report(0, 5))  # from its checkpoint: no progress
    assert not ending()
    ending.listen(failure(0, machines=True))

    assert ending()
    assert (ending.reason, ending.exit_code) == ("gone", 1)


def test_failures_between_which_a_trial_gets_on_end_nothing() -> None:
    ending = StopConditions(SearchConfig())
    for step in range(1, 5):
        ending.listen(failure(0, machines=True))
        ending.listen(report(1, step))

    assert not ending()


def test_errors_of_the_trials_themselves_end_nothing() -> None:
    ending = StopConditions(SearchConfig())
    for _ in range(4):
        ending.listen(failure(0, machines=False))

    assert not ending()


def test_a_second_hang_up_ends_nothing_more() -> None:
    """A shell passes on the one that its terminal has sent to the search as well."""
    ending = StopConditions(SearchConfig())
    with interruptible(ending, lambda _: None):
        os.kill(os.getpid(), signal.SIGHUP)
        assert ending()
        assert ending.exit_code == 129
        os.kill(os.getpid(), signal.SIGHUP)


def test_under_nohup_nothing_is_hung_up() -> None:
    ending = StopConditions(SearchConfig())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(ending, lambda _: None):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not ending()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_second_one_leaves(signum: signal.Signals) -> None:
    ending, said = StopConditions(SearchConfig()), []
    before = signal.getsignal(signum)
    with interruptible(ending, said.append):
        os.kill(os.getpid(), signum)
        assert ending()
        assert ending.exit_code == 128 + signum
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)

    assert len(said) == 1
    assert signal.getsignal(signum) == before


def test_ctrl_c_after_a_budget_ends_the_confirmation_too() -> None:
    ending = StopConditions(SearchConfig(token_budget=1))
    ending.listen(report(0, 1, tokens=5))
    assert not ending.urgent
    ending.interrupt(signal.SIGINT)

    assert (ending.reason, ending.exit_code) == ("interrupted", 130)
