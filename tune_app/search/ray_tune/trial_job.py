"""What a trial asks its host to do. Imports neither torch nor ray: trial actors load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tune_app.run.trial_config import TrialConfig


def trial_name(number: int) -> str:
    """The trial's name in Ray, where its actor and the events learn its number."""
    return f"trial-{number:03d}"


def number_of(name: str) -> int:
    return int(name.removeprefix("trial-"))


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
    """One trial's training."""

    number: int
    config: TrialConfig
    checkpoint: Path  # folder where its state is kept, and found again
    test: bool = False  # confirmation: evaluate once, at the end, and on the whole test split too
    # One of a population: after a report it waits to be asked for the next one, and what it
    # trained until then is kept, for others to go on from.
    population: bool = False
    begin: Path | None = None  # the state to go on from until it has one of its own by this config
