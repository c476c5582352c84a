"""How torch's threads share the processors with everything else that a search runs."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Has torch's threads sleep while they wait; to be called before torch is loaded.

    By default GNU's OpenMP, torch's own on Linux, lets them spin for long. That takes the
    processors from Ray, from the servers and from other programs: on two cores that have something
    else to do as well, packs take three to five times as long. A short spin costs an idle machine
    nothing that can be measured; no spin at all (OMP_WAIT_POLICY=PASSIVE) costs it a quarter. What
    the user has set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
