"""What the confirmation trains next, whatever was done before and wherever it was cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tune_app.report.results import load
from tune_app.run.config_checks import check_search_config
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.search.confirm_plan import ConfirmRun, Step, next_step

CONFIG = SearchConfig(confirm=2)


class Search:
    """A finished search, and a confirmation that trains what the plan says."""

    def __init__(self, folder: Path, gap: float) -> None:
        """gap: of each config's test loss from the default's, but for a little of the seed's."""
        self.run, self.gap = RunDir(folder).create(), gap
        self.run.write_atomic(self.run.search_yaml, "confirm_seeds: 6\n")
        for trial, loss in enumerate((2.0, 1.9, 1.5, 1.6, 1.7)):
            self.trained(trial, TrialConfig(), loss, origin="default" if trial < 2 else "suggested")

    def plan(self, config: SearchConfig = CONFIG, *, extend: bool = True) -> Step:
        return next_step(load(self.run), config, extend=extend)

    def train(self, again: ConfirmRun, status: str = "finished") -> None:
        loss = 2.0 + (self.gap if again.of > 1 else 0.0) * (1 + again.seed_index % 3)
        tested = {"test_loss": loss} if again.look else {}
        number = 100_000 + 100 * again.of + again.seed_index
        start = {"origin": "confirm", "of": again.of, "look": again.look}
        self.trained(number, again.config, 1.8 - again.of / 100, status, **start, **tested)

    def trained(
        self, number: int, config: TrialConfig, loss: float, status: str = "finished", **more: Any
    ) -> None:
        start = {name: more.pop(name) for name in ("origin", "of", "look") if name in more}
        write = self.run.append_event
        event = {"event": "trial_started", "trial": number, "config": config.to_dict()}
        write(event | start)
        write({"event": "report", "trial": number, "step": 100, "eval_loss": loss, **more})
        if status:
            write({"event": "trial_ended", "trial": number, "status": status})


def seeds(step: Step) -> list[tuple[int, int, int]]:
    return [(again.of, again.seed_index, again.look) for again in step.runs]


def test_it_chooses_with_two_seeds_then_judges_with_others_until_it_knows(tmp_path: Path):
    search = Search(tmp_path, gap=-0.1)
    step = search.plan()
    assert seeds(step) == [(2, 1, 0), (3, 1, 0), (2, 2, 0), (3, 2, 0)]
    assert {again.config.seed for again in step.runs} == {1000, 2000}
    for again in step.runs:
        search.train(again)

    # Trial 1 is the better default, trial 3 the better candidate by these seeds.
    step = search.plan()
    assert seeds(step) == [(of, seed, 1) for seed in (3, 4, 5) for of in (1, 3)]
    for again in step.runs:
        search.train(again)

    # Differences of 0.1, 0.2 and 0.3 decide nothing yet.
    step = search.plan()
    assert seeds(step) == [(of, seed, 2) for seed in (6, 7, 8) for of in (1, 3)]
    assert not search.plan(extend=False).runs  # a budget is spent
    for again in step.runs:
        search.train(again)
    assert not search.plan().runs


def test_what_is_decided_ends_it(tmp_path: Path):
    search = Search(tmp_path, gap=0.0)
    for _ in range(2):
        for again in search.plan().runs:
            search.train(again)
    assert not search.plan().runs  # equal in three pairs: no gain


def test_a_single_candidate_is_judged_at_once(tmp_path: Path):
    step = Search(tmp_path, gap=-0.1).plan(SearchConfig(confirm=1, confirm_seeds=2))
    assert seeds(step) == [(of, seed, 1) for seed in (3, 4) for of in (1, 2)]


@pytest.mark.parametrize("status", ["", "finished", "diverged", "failed"])
def test_after_a_kill_only_what_has_not_ended_comes_again(tmp_path: Path, status: str):
    search = Search(tmp_path, gap=-0.1)
    for again in search.plan().runs:
        search.train(again)
    first, *rest = search.plan().runs
    search.train(first, status)
    left = seeds(search.plan())
    assert left == seeds(Step(tuple(rest if status else (first, *rest))))


def test_a_look_that_was_begun_ends_although_the_budget_is_spent(tmp_path: Path):
    search = Search(tmp_path, gap=-0.1)
    for _ in range(2):
        for again in search.plan().runs:
            search.train(again)
    second = search.plan().runs
    search.train(second[0])
    search.train(second[1])
    assert seeds(search.plan(extend=False)) == seeds(Step(second[2:]))


def test_more_seeds_later_are_a_look_of_their_own(tmp_path: Path):
    search = Search(tmp_path, gap=-0.1)
    few = SearchConfig(confirm=2, confirm_seeds=3)
    while runs := search.plan(few).runs:
        for again in runs:
            search.train(again)
    more = SearchConfig(confirm=2, confirm_seeds=5)
    assert seeds(search.plan(more)) == [(of, seed, 2) for seed in (6, 7) for of in (1, 3)]


def test_another_best_config_after_more_trials_spends_what_is_left(tmp_path: Path):
    search = Search(tmp_path, gap=-0.1)
    for _ in range(3):
        for again in search.plan().runs:
            search.train(again)
    for trial in (5, 6):
        search.trained(trial, TrialConfig(), 1.0 + trial / 100, origin="suggested")
    assert seeds(search.plan()) == [(5, 1, 0), (6, 1, 0), (5, 2, 0), (6, 2, 0)]
    for again in search.plan().runs:
        search.train(again)
    # The default has its runs with these seeds already.
    assert seeds(search.plan()) == [(6, 3, 3), (6, 4, 3), (6, 5, 3)]


def test_without_a_config_or_a_default_nothing_is_trained(tmp_path: Path):
    search = Search(tmp_path / "a", gap=-0.1)
    search.run.events_jsonl.unlink()
    assert not search.plan().runs
    search.trained(0, TrialConfig(), 2.0, origin="default")
    assert not search.plan().runs


def test_more_seeds_than_numbers_have_room_for_are_refused():
    assert check_search_config(SearchConfig(confirm_seeds=96)) == []
    assert "--confirm-seeds: must be 96 or less, got 101." in check_search_config(
        SearchConfig(confirm_seeds=101)
    )
