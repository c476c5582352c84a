"""How torch's threads share the processors with everything else that a search runs."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Has torch's threads sleep while they wait; to be called before torch is loaded.

    By default they spin, which takes the processors from Ray, from the servers and from other
    programs: on two cores that have something else to do as well, a pack takes three to five times
    as long. A user's own OMP_WAIT_POLICY is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
