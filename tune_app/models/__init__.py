"""A frozen causal language model as a folder and its parts.

The classes for a training loop of one's own are in a room further down, since they need backbones;
here is where people look for them. Nothing is loaded before one is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("tune_app.train.hf_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
