"""The job of one trial: the record that goes from the study to the host.

Imports neither torch nor ray, because trial actors load it, and executors without Ray use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune_app.run.run_dir import population_state
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report

JOB = "job"  # the only key of the config that Ray Tune sees; its value is a TrialJob
DUPLICATE = "__duplicate__"  # Ray Tune's key for a result that repeats the last one
REPORT = "report"  # the key of the Report in the result that Ray Tune sees


def report_of(result: Mapping[str, Any] | None) -> Report | None:
    """The report in the last result that Ray Tune has of a trial; None before the first one."""
    report: Report | None = (result or {}).get(REPORT)
    return report


def trial_name(number: int) -> str:
    """The trial's name in Ray and in the trackers."""
    return f"trial-{number:03d}"


# Numbers of confirmation runs start far above those of the study, which may grow.
FIRST_CONFIRMATION = 100_000


def confirmation_number(of: int, seed_index: int) -> int:
    """The number of the run that confirms a trial with its first, second, ... fresh seed."""
    return FIRST_CONFIRMATION + of * 100 + seed_index


def seed_index_of(number: int) -> int:
    """The 1-based index of the confirmation run's fresh seed."""
    return number % 100


@dataclass(frozen=True)
class TrialJob:
    """One trial's training. Can be pickled; equal jobs give equal results.

    number: the trial's number in the study, or `confirmation_number`
    checkpoint: folder where its state is saved, and found again after an interruption
    origin: "default", "enqueued", "warm_start", "suggested" or "confirm"
    of: the trial that a confirmation run repeats
    look: for a confirmation run: 0 if it helps to choose, otherwise the number of the look that it
        is for
    test: at the end, evaluate on the whole test split too (confirmation runs that judge)
    population: part of a population: after each report the trial waits until the next one is
        requested, and its state is saved, so that other trials can be cloned from it
    begin: state to start from, used until this trial has saved a checkpoint with this same config
    deciding: steps whose evaluations decide something (`trial_report.deciding_steps`); None: all
    """

    number: int
    config: TrialConfig
    checkpoint: Path
    origin: str = "suggested"
    of: int | None = None
    look: int | None = None
    test: bool = False
    population: bool = False
    begin: Path | None = None
    deciding: tuple[int, ...] | None = None

    @property
    def is_default(self) -> bool:
        """Whether the best config may be compared with it, so that it must not be stopped or
        changed."""
        return self.number == 0 or self.origin == "default"

    def hyperparameters(self) -> dict[str, Any]:
        """The config's values that are set, for programs that show them by name."""
        return {name: value for name, value in self.config.to_dict().items() if value is not None}

    @property
    def name(self) -> str:
        return trial_name(self.number)

    def cloned(self, donor: Path, step: int, config: TrialConfig) -> TrialJob:
        """This trial as a clone: it trains with `config`, from the state after `step` steps of the
        trial whose checkpoint folder is `donor`."""
        return replace(self, config=config, begin=population_state(donor, step))


def job_of(config: Mapping[str, Any]) -> TrialJob:
    """The job in the config that Ray Tune has of a trial."""
    job: TrialJob = config[JOB]
    return job
