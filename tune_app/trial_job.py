"""What a trial asks its host to do. Imports neither torch nor ray: trial actors load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tune_app.trial_config import TrialConfig


def trial_name(number: int) -> str:
    """The trial's name in Ray, which is also where it learns its number.

    Population-based training copies one trial's config over another's, and a number in it too.
    """
    return f"trial-{number:03d}"


def number_of(name: str) -> int:
    return int(name.removeprefix("trial-"))


@dataclass(frozen=True)
class Connection:
    """The swarm that hosts connect to; no peers and no prefix for a local backbone."""

    peers: tuple[str, ...] = ()
    dht_prefix: str | None = None


@dataclass(frozen=True)
class TrialJob:
    """One trial's training."""

    number: int
    config: TrialConfig
    checkpoint: Path  # folder where its state is kept, and found again
    start_from: bytes | None = None  # a state to go on from instead (population-based training)
    test: bool = False  # confirmation: evaluate once, at the end, and on the whole test split too
    hand_over: bool = False  # Ray Tune wants the checkpoint (population-based training)
