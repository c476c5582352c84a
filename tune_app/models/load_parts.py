"""Loads a causal language model, or some of its blocks, or what comes before and after them.

A part is built by the family's own class with unwanted modules replaced by `nn.Identity`, and
filled by transformers' `from_pretrained`, which knows how that family's weights are named, tied,
split over files and converted. It reads only what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from tune_app.run.search_config import ConfigError


def load_whole(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `folder`, frozen, on the CPU.

    Raises ConfigError if the folder has no causal language model or lacks some of its weights.
    """
    return _load(MODEL_FOR_CAUSAL_LM_MAPPING, folder, dtype, lambda model: None)


def load_ends(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Like `load_whole`, without the blocks."""

    def strip(model: PreTrainedModel) -> None:
        blocks = blocks_of(model)
        for index in range(len(blocks)):
            blocks[index] = nn.Identity()

    return _load(MODEL_FOR_CAUSAL_LM_MAPPING, folder, dtype, strip)


def load_blocks(folder: str | Path, keep: Collection[int], dtype: torch.dtype) -> PreTrainedModel:
    """The headless model with only the blocks `keep`, without word embeddings and norms."""

    def strip(model: PreTrainedModel) -> None:
        blocks, words = blocks_of(model), model.get_input_embeddings()
        for index in set(range(len(blocks))) - set(keep):
            blocks[index] = nn.Identity()
        for name, child in model.named_children():
            # Learned positions (GPT-2) are small and stay, because the family's forward uses them.
            positions = isinstance(child, nn.Embedding) and child is not words
            has_weights = next(child.parameters(), None) is not None
            if has_weights and child is not blocks and not positions:
                setattr(model, name, nn.Identity())

    return _load(MODEL_MAPPING, folder, dtype, strip)


def load_first_block(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Like `load_whole`, for a model that ends after its first block."""
    config = AutoConfig.from_pretrained(str(folder))
    cut_to_one_block(config, 0)
    return _load(MODEL_FOR_CAUSAL_LM_MAPPING, folder, dtype, lambda model: None, config)


def _load(
    families: Any,
    folder: str | Path,
    dtype: torch.dtype,
    strip: Callable[[PreTrainedModel], None],
    config: Any = None,
) -> PreTrainedModel:
    """What `strip` leaves of the model; the rest is neither allocated nor read."""
    config = config or AutoConfig.from_pretrained(str(folder))
    if type(config) not in families:
        raise ConfigError(
            f"{str(folder)!r} has a model of type {config.model_type!r}, for which transformers "
            "has no causal language model."
        )
    family = families[type(config)]

    class Part(family):  # type: ignore[misc, valid-type]
        _keys_to_ignore_on_load_unexpected = (".*",)  # the weights of removed modules

        def __init__(self, config: Any) -> None:
            # from_pretrained builds it on the meta device, where numbers have no values.
            with no_init_weights():
                super().__init__(config)
            strip(self)

    # transformers finds conversions of old checkpoints by the name of the class.
    Part.__name__, Part.__qualname__, Part.__module__ = (
        family.__name__,
        family.__qualname__,
        family.__module__,
    )
    with _no_progress_bars():
        model, loading = Part.from_pretrained(
            str(folder), config=config, dtype=dtype, output_loading_info=True
        )
    lacking = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if lacking:  # transformers would continue with random numbers
        raise ConfigError(
            f"{str(folder)!r} lacks weights of its {config.model_type} model, or has them in "
            f"another shape: {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}"
        )
    return model.requires_grad_(False).eval()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's blocks. Raises ConfigError if it is not where most families have it.

    That is the case for OPT, whose blocks are inside a decoder, and for multimodal models.
    """
    base = model.base_model
    count = getattr(base.config, "num_hidden_layers", None)
    for child in base.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ConfigError(
        f"models of type {base.config.model_type!r} are not supported: their blocks are not a list "
        f"in {type(base).__name__}, as those of Llama, Qwen, Gemma, Mistral and others are."
    )


def cut_to_one_block(config: Any, index: int) -> None:
    """Makes it the config of a model of one block, of the kind that block `index` is."""
    config.num_hidden_layers = 1
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[index]]
