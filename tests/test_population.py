"""Who goes on from whom in a population, over as much of Ray Tune as its scheduler sees."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from tune_app.run.run_dir import RunDir, population_state
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_report import OBJECTIVE
from tune_app.search.ray_tune.population import Population
from tune_app.search.trial_job import JOB, TrialJob, job_of, trial_name
from tune_app.study.yaml_space import load_space


@dataclass
class Trial:
    """As much of Ray's Trial as its scheduler looks at."""

    number: int
    config: dict[str, Any]
    status: str = "RUNNING"

    def __str__(self) -> str:
        return trial_name(self.number)

    def __hash__(self) -> int:
        return self.number

    trial_id = property(__str__)

    def is_finished(self) -> bool:
        return self.status in ("ERROR", "TERMINATED")

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


class Controller:
    """As much of Tune's: it only writes down who trains on."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials, self.trained = trials, list[int]()
        self._tune_controller = self

    def get_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        assert not should_checkpoint
        trial.status = "PAUSED"

    def _schedule_trial_train(self, trial: Trial) -> None:
        self.trained.append(trial.number)


SPACE = load_space("default")
BASE = SearchConfig(steps=50).base_trial()


class Rounds:
    """A population of 8 over a fake controller."""

    def __init__(self, decided: int = 0, seed: int = 0) -> None:
        run = RunDir("run")
        jobs = [TrialJob(i, replace(BASE, lr=1e-3 * (i + 1)), run.checkpoint(i)) for i in range(8)]
        self.trials = [Trial(job.number, {JOB: job}) for job in jobs]
        self.controller, self.told = Controller(self.trials), []
        self.population = Population(
            *(SPACE, BASE),
            size=8,
            seed=seed,
            decided=decided,
            changed=lambda event: self.told.append((event.step, event.changed)),
        )
        self.population.set_search_properties(OBJECTIVE, "min")
        for trial in self.trials:
            self.population.on_trial_add(self.controller, trial)

    def report(self, number: int, step: int, loss: float) -> str:
        result = {OBJECTIVE: loss, "step": step}
        return self.population.on_trial_result(self.controller, self.trials[number], result)

    def turn(self) -> Trial | None:
        return self.population.choose_trial_to_run(self.controller)


def test_all_wait_and_then_the_worst_quarter_goes_on_from_the_best() -> None:
    rounds = Rounds()
    for number in range(7):
        assert rounds.report(number, 10, 2.0 - number / 10) == TrialScheduler.NOOP
        assert rounds.turn() is None
    assert rounds.controller.trained == []
    rounds.report(7, 10, 1.95)

    # The default, trial 0, is the worst but goes on as itself; then comes trial 7.
    assert rounds.turn() is rounds.trials[7]
    assert sorted(rounds.controller.trained) == [0, 1, 2, 3, 4, 5, 6]
    ((step, (change,)),) = rounds.told
    assert (step, change.trial) == (10, 7)
    assert change.of in (5, 6)
    job = job_of(rounds.trials[7].config)
    assert job.number == 7
    assert job.begin == population_state(RunDir("run").checkpoint(change.of), 10)
    assert job.config.at(9) == replace(BASE, lr=1e-3 * (change.of + 1))
    assert job.config.changes
    assert job.config == change.config
    # It repeats the last report of the state that it goes on from, and then trains on.
    assert rounds.report(7, 10, 1.4) == TrialScheduler.CONTINUE


def test_the_default_is_a_donor_like_any_other() -> None:
    rounds = Rounds()
    for number in range(8):
        rounds.report(number, 10, 1.0 + number)
    rounds.turn()
    assert {change.of for change in rounds.told[0][1]} <= {0, 1}
    assert {change.trial for change in rounds.told[0][1]} == {6, 7}


def test_nobody_waits_for_a_trial_that_has_ended() -> None:
    rounds = Rounds()
    for number in range(7):
        rounds.report(number, 10, 2.0)
    rounds.turn()
    assert rounds.told == []
    rounds.trials[7].status = "TERMINATED"  # it has diverged on the way
    rounds.turn()
    assert [step for step, _ in rounds.told] == [10]
    assert 7 not in rounds.controller.trained


def test_a_trial_that_has_failed_once_is_waited_for() -> None:
    rounds = Rounds()
    for number in range(8):
        if number == 7:  # as Ray does where it starts a trial again
            rounds.population.on_trial_add(rounds.controller, rounds.trials[3])
            rounds.trials[3].status = "PENDING"
        rounds.report(number, 10, 2.0)
    rounds.turn()
    assert rounds.told == []
    rounds.trials[3].status = "RUNNING"
    rounds.report(3, 10, 2.0)
    rounds.turn()
    assert [step for step, _ in rounds.told] == [10]


def test_a_population_that_goes_on_holds_no_round_twice() -> None:
    rounds = Rounds(decided=10)
    for number in range(8):
        assert rounds.report(number, 10, 1.0 + number) == TrialScheduler.CONTINUE
    rounds.turn()
    assert rounds.told == []
    for number in range(8):
        rounds.report(number, 20, 1.0 + number)
    rounds.turn()
    assert [step for step, _ in rounds.told] == [20]


def test_rounds_follow_from_seed_and_losses() -> None:
    def told(seed: int) -> list[Any]:
        rounds = Rounds(seed=seed)
        for number in random.sample(range(8), 8):  # whoever comes first
            rounds.report(number, 10, 1.0 + number)
        rounds.turn()
        return rounds.told

    assert told(0) == told(0)
    assert any(told(0) != told(seed) for seed in range(1, 4))
