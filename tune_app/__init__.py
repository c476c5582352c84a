"""Hyperparameter search for prompt tuning over a frozen language model; docs/python.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_app.api.prompts import load_prompts
    from tune_app.api.search import load_run, run_search
    from tune_app.api.trainable import make_trainable
    from tune_app.api.training import run_training
    from tune_app.run.search_config import SearchConfig
    from tune_app.run.trial_config import TrialConfig

# Loaded when they are asked for: `import tune_app` has to stay free of torch and Ray.
_HOME = {
    "SearchConfig": "tune_app.run.search_config",
    "TrialConfig": "tune_app.run.trial_config",
    "load_prompts": "tune_app.api.prompts",
    "load_run": "tune_app.api.search",
    "make_trainable": "tune_app.api.trainable",
    "run_search": "tune_app.api.search",
    "run_training": "tune_app.api.training",
}
__all__ = [
    "SearchConfig",
    "TrialConfig",
    "load_prompts",
    "load_run",
    "make_trainable",
    "run_search",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
