"""A frozen causal language model as a folder and its parts.

The classes for your own training loop are in `tune_app.train`, because they need backbones, but
people look for them here. They are only loaded on first use.
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
