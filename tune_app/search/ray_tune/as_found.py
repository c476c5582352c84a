"""What a search changes of Ray in the caller's process, and changes back: a Tuner of the caller's
own comes after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.train._internal.storage import StorageContext
from ray.tune.execution import class_cache
from ray.tune.experiment.trial import _TrialInfo


@contextmanager
def ray_as_found() -> Iterator[None]:
    """Afterwards Ray's trials have their environment and what is sent to them again: `trainable.py`
    has taken both away, for trials that need neither."""
    environment = dict(class_cache.DEFAULT_ENV_VARS)
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS.update(environment)
        for sent in (StorageContext, _TrialInfo):
            ray.util.deregister_serializer(sent)
