"""What one trial has to do: the record that goes from the study to the host, and whoever asks.

Imports neither torch nor ray: trial actors load it, and so may an executor without Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tune_app.run.run_dir import population_state
from tune_app.run.trial_config import TrialConfig
from tune_app.run.trial_report import Report

JOB = "job"  # the one key of what Ray Tune takes for a trial's config; its value is a TrialJob
DUPLICATE = "__duplicate__"  # what a result says that repeats the last one, in Ray Tune's words
REPORT = "report"  # the key of the Report in what Ray Tune takes for a result


def report_of(result: Mapping[str, Any] | None) -> Report | None:
    """The report in what Ray Tune takes for a trial's last result; None before the first one."""
    report: Report | None = (result or {}).get(REPORT)
    return report


def trial_name(number: int) -> str:
    """The trial's name in Ray and in the trackers."""
    return f"trial-{number:03d}"


# Numbers of confirmation runs begin far from those of the study, which may grow.
FIRST_CONFIRMATION = 100_000


def confirmation_number(of: int, seed_index: int) -> int:
    """The number of the run that confirms a trial with its first, second, ... fresh seed."""
    return FIRST_CONFIRMATION + of * 100 + seed_index


def seed_index_of(number: int) -> int:
    """Which fresh seed, from 1, the confirmation run of that number has."""
    return number % 100


@dataclass(frozen=True)
class TrialJob:
    """One trial's training. Pickles; equal jobs train alike.

    number: the trial's number in the study, or `confirmation_number`
    checkpoint: folder where its state is saved, and found again after an interruption
    origin: "default", "enqueued", "warm_start", "suggested" or "confirm"
    of: the trial that a confirmation run repeats
    look: of a confirmation run: 0 where it chooses, else the number of the look that it is for
    test: evaluate on the whole test split too, at the end (confirmation runs that judge)
    population: part of a population: after each report the trial waits until the next one is asked
        for, and its state is saved, so that other trials can be cloned from it
    begin: the state to start from, used until this trial has saved one of its own by this config
    deciding: the steps whose evaluations decide something (`trial_report.deciding_steps`); None:
        all of them
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
        """Whether answers may be stated against it, so that nothing ends or changes it early."""
        return self.number == 0 or self.origin == "default"

    def hyperparameters(self) -> dict[str, Any]:
        """What its config sets, for programs that show values by name."""
        return {name: value for name, value in self.config.to_dict().items() if value is not None}

    @property
    def name(self) -> str:
        return trial_name(self.number)

    def cloned(self, donor: Path, step: int, config: TrialConfig) -> TrialJob:
        """This trial as a clone: it trains by `config` from the state that the trial with the
        checkpoint folder `donor` had after `step` steps."""
        return replace(self, config=config, begin=population_state(donor, step))


def job_of(config: Mapping[str, Any]) -> TrialJob:
    """The job in what Ray Tune takes for a trial's config."""
    job: TrialJob = config[JOB]
    return job
