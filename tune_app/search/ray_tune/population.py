"""Population-based training: Ray Tune's scheduler, and the population that it works on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.search.ray_tune.recorder import Recorder
from tune_app.search.ray_tune.searcher import StudySearcher
from tune_app.search.ray_tune.trial_job import number_of
from tune_app.study.explore import explore
from tune_app.study.space import SearchSpace

Event = dict[str, Any]


class Population(PopulationBasedTraining):
    """Ray's PopulationBasedTraining, synchronous: after each evaluation but the last all trials
    wait for each other, and the worst quarter goes on from copies of the best, with other configs.

    Ray's own ranks, clones and restarts. Different are:

    - who waits keeps its actor, without a call, and its thread in the host. Ray would end and start
      the actors of all trials each time, and lets nobody go on once the last one to come fails;
    - whom a trial copies, and the changes, follow from the seed and the losses. Ray draws from the
      global generators;
    - the hosts have kept what trials have trained (`kept_state`), so nothing passes through Ray;
    - the documented default goes on as itself, however it stands: the answer is stated against it.

    A round is one event, written before any trial goes on from it, so that it has happened as a
    whole or not at all when the search is killed.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: TrialConfig,
        *,
        size: int,
        seed: int,
        decided: int,
        changed: Callable[[int, list[Event]], None],
    ) -> None:
        """decided: the step of the last round, of which `changed` is told with all changes; its
        trials have one each, `{"trial": 3, "of": 1, "config": {...}}`"""
        super().__init__(
            time_attr="step",
            perturbation_interval=1,
            custom_explore_fn=explore,  # never asked: see `_get_new_config`
            log_config=False,
            synch=True,
        )
        self._space, self._base, self._size, self._seed = space, base, size, seed
        self._decided, self._changed = decided, changed

    def __getstate__(self) -> Event:
        return {}  # Ray pickles it for a `Tuner.restore` that never comes

    def on_trial_result(self, controller: Any, trial: Trial, result: Event) -> str:
        step = result["step"]
        self._save_trial_state(self._trial_state[trial], step, result, trial)
        # A trial that goes on repeats its last report.
        return TrialScheduler.NOOP if step > self._decided else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """Asked in every turn of Tune's loop: so nobody waits for a trial that has just ended."""
        alive = [trial for trial in controller.get_trials() if not trial.is_finished()]
        steps = [self._trial_state[trial].last_train_time for trial in alive]
        if len(controller.get_trials()) == self._size and steps and min(steps) > self._decided:
            self._decide(controller, alive, min(steps))
        return next((trial for trial in alive if trial.status == Trial.PAUSED), None)

    def _decide(self, controller: Any, alive: list[Trial], step: int) -> None:
        self._rng, self._step = random.Random(f"{self._seed} {step}"), step
        worst, best = self._quantiles()
        changes = []
        for trial in worst:
            if number_of(str(trial)) == 0:
                continue
            donor = self._rng.choice(best)
            self._exploit(controller, trial, donor)
            # Else Ray would ask its actor to restore what this hands over.
            trial.run_metadata.checkpoint_manager._latest_checkpoint_result = None
            of, config = number_of(str(donor)), trial.config["job"]["trial"]
            changes.append({"trial": number_of(str(trial)), "of": of, "config": config})
        self._decided = step
        self._changed(step, changes)
        for trial in alive:
            if trial.status == Trial.RUNNING:
                # Ray's wrapper has no name for it; a trial that was not paused is not resumed.
                controller._tune_controller._schedule_trial_train(trial)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[Event, Event]:
        job, donor = trial.config["job"], trial_to_clone.config["job"]
        config = explore(
            TrialConfig.from_dict(donor["trial"]), self._step, self._space, self._base, self._rng
        )
        return {"job": gone_over(job, donor["number"], self._step, config.to_dict())}, {}


def gone_over(job: Event, of: int, step: int, config: Event) -> Event:
    """The job of a trial that goes on from what trial `of` had trained after `step` steps."""
    return {**job, "trial": config, "begin": {"trial": of, "step": step}}


def as_population(
    config: SearchConfig,
    space: SearchSpace,
    events: list[Event],
    searcher: StudySearcher,
    size: int,
    recorder: Recorder,
) -> dict[str, Any]:
    """What `tuning.py` gives to Tune so that `size` trials, asked of the study at once, train as a
    population. It goes on from where the run's events left it."""
    rounds = [event for event in events if event["event"] == "population_changed"]
    jobs = {job["number"]: {**job, "population": True} for job in searcher.ask(size)}
    for event in rounds:
        for change in event["changed"]:
            if change["trial"] in jobs:  # else it has ended
                job = jobs[change["trial"]]
                jobs[change["trial"]] = gone_over(
                    job, change["of"], event["step"], change["config"]
                )

    def changed(step: int, changes: list[Event]) -> None:
        recorder.record("population_changed", step=step, changed=changes)

    return {
        "trials": 1,  # of the grid
        "searcher": BasicVariantGenerator(),
        "scheduler": Population(
            space,
            config.base_trial(),
            size=size,
            seed=config.seed,
            decided=max((event["step"] for event in rounds), default=0),
            changed=changed,
        ),
        # The study first, as Ray's searchers are: see `missing_events`.
        "callbacks": [TellsStudy(searcher), recorder],
        "param_space": {"job": tune.grid_search(list(jobs.values()))},
        "at_once": size,
    }


class TellsStudy(tune.Callback):
    """Tells the study of trials that Ray has not got from it: its own way to do so is a searcher,
    beside which it refuses population-based training."""

    def __init__(self, searcher: StudySearcher) -> None:
        self._searcher = searcher

    def __getstate__(self) -> Event:
        return {}  # as the scheduler's

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Event, **info: Any
    ) -> None:
        self._searcher.on_trial_result(str(trial), result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._tell(trial)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._tell(trial, error=True)

    def _tell(self, trial: Trial, error: bool = False) -> None:
        changes = trial.config["job"]["trial"].get("changes")
        if changes:
            self._searcher.note(str(trial), "trained", trial.config["job"]["trial"])
        self._searcher.on_trial_complete(str(trial), trial.last_result, error)
