"""Parts of a causal language model: some of its blocks, or what comes before and after them.

There is no family-specific code here, nor in `load_parts.py`. A part is run by the family's own
`forward`, over a model whose list of blocks has one entry: a stand-in. That code makes masks,
positions, rotary embeddings and sliding windows as it does for the whole model. What it does to
hidden states before and after the blocks is kept by `Ends` and discarded by `Block`.

Shapes: see `backbones/protocol.py`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from tune_app.models.load_parts import blocks_of, cut_to_one_block
from tune_app.models.threads import products_per_position

# Hidden states -> hidden states, [B, S, H]: all blocks of a model, wherever they run.
Blocks = Callable[[torch.Tensor], torch.Tensor]


def _twin(module: Any) -> Any:
    """A copy with the same children, any of which may then be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _around(model: PreTrainedModel, index: int, stand_in: nn.Module) -> Any:
    """The headless model with `stand_in` as its only block, treated as block `index` would be."""
    base, blocks = model.base_model, blocks_of(model)
    shell = _twin(base)
    shell.config = copy.deepcopy(base.config)
    cut_to_one_block(shell.config, index)
    setattr(shell, _list_name(base, blocks), nn.ModuleList([stand_in]))
    return shell


def _list_name(base: nn.Module, blocks: nn.ModuleList) -> str:
    (name,) = (name for name, child in base.named_children() if child is blocks)
    return name


class Block(nn.Module):
    """Block `index` of `model` (from `load_blocks` or whole), called as in the whole model.

    Thread-safe.
    """

    def __init__(self, model: PreTrainedModel, index: int) -> None:
        super().__init__()
        self.index, self.passing = index, _Passing()
        self.slot = _Slot(blocks_of(model)[index], self.passing)
        self.shell = _around(model, index, self.slot)

    def forward(self, hidden_BSH: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H], differentiable; with a cache, S is the positions after it."""
        passing = self.passing
        passing.hidden = hidden_BSH
        try:
            self.shell(inputs_embeds=hidden_BSH.detach(), use_cache=cache is not None, cache=cache)
            return passing.hidden
        finally:
            passing.hidden = None


class Span(nn.Module):
    """Several blocks in one pass of the family's `forward`, which then makes masks and positions
    only once; the results are the same. Their weights are those of `blocks`.

    Thread-safe.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.indices, self.passing = [block.index for block in blocks], _Passing()
        first = blocks[0]
        self.products_per_position = products_per_position(first.slot)
        self.shell = _twin(first.shell)
        self.shell.config = config = copy.deepcopy(first.shell.config)
        config.num_hidden_layers = len(blocks)
        if hasattr(config, "layer_types") and config.layer_types:
            config.layer_types = [block.shell.config.layer_types[0] for block in blocks]
        slots = [_Slot(block.slot.block, self.passing, at) for at, block in enumerate(blocks)]
        name = _list_name(first.shell, blocks_of(first.shell))
        setattr(self.shell, name, nn.ModuleList(slots))

    def forward(
        self, hidden_BSH: torch.Tensor, deep: Sequence[torch.Tensor | None], cache: Cache
    ) -> torch.Tensor:
        """[B, S, H] -> [B, S, H], S being the positions after the cache.

        deep: what is added to the first of these positions, None or [B, P, H] for each block
        """
        passing = self.passing
        passing.hidden, passing.deep_of = hidden_BSH, deep
        try:
            self.shell(inputs_embeds=hidden_BSH.detach(), use_cache=True, cache=cache)
            return passing.hidden
        finally:
            passing.hidden, passing.deep_of = None, ()


class _Slot(nn.Module):
    """Stands in for a block: gives it its real input and keeps its real output."""

    def __init__(self, block: nn.Module, passing: _Passing, at: int = 0) -> None:
        super().__init__()
        self.block, self.passing, self.at = block, passing, at

    def forward(self, hidden_BSH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        real_BSH = self.passing.hidden
        if (deep_BPH := self.passing.deep_of[self.at]) is not None:
            assert real_BSH is not None
            real_BSH = with_deep_prompt(real_BSH, deep_BPH)
        result = self.block(real_BSH, *args, **kwargs)
        as_tuple = isinstance(result, tuple)
        self.passing.hidden = result[0] if as_tuple else result
        return (hidden_BSH,) if as_tuple else hidden_BSH


class _Passing(threading.local):
    """What the caller and the stand-in pass to each other, separately for each thread."""

    hidden: torch.Tensor | None = None
    blocks: Blocks | None = None
    deep: torch.Tensor | None = None
    deep_of: Sequence[torch.Tensor | None] = (None,)  # of each block


class Whole(nn.Module):
    """All of `model` (from `load_whole`), with deep prompts added to the inputs of its blocks.

    Thread-safe.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.words = model.get_input_embeddings()
        self.head = Head(model)
        self.trunk = model.base_model
        self._passing = _Passing()
        self.products_per_position = products_per_position(blocks_of(model)[0])
        for index, block in enumerate(blocks_of(model)):
            block.register_forward_pre_hook(self._adding_deep_prompts(index))

    def forward(
        self,
        embeds_BSH: torch.Tensor,
        deep_LBPH: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Word embeddings [B, S, H] to hidden states after the final norm; with a cache, S is the
        positions after it."""
        self._passing.deep = deep_LBPH
        try:
            out = self.trunk(inputs_embeds=embeds_BSH, use_cache=cache is not None, cache=cache)
            return out.last_hidden_state
        finally:
            self._passing.deep = None

    def _adding_deep_prompts(self, index: int) -> Callable[[Any, Any], Any]:
        def hook(_block: Any, args: Any) -> Any:
            deep_LBPH = self._passing.deep
            if deep_LBPH is None:
                return None
            return (with_deep_prompt(args[0], deep_LBPH[index]), *args[1:])

        return hook


def with_deep_prompt(hidden_BSH: torch.Tensor, deep_BPH: torch.Tensor) -> torch.Tensor:
    """A block's input with `deep_BPH` added to its first P positions, as Petals' servers do."""
    prompt_tokens = deep_BPH.shape[1]
    return torch.cat(
        [hidden_BSH[:, :prompt_tokens] + deep_BPH, hidden_BSH[:, prompt_tokens:]], dim=1
    )


class Ends(nn.Module):
    """What comes before and after the blocks of `model` (from `load_ends` or whole).

    Thread-safe.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.words = model.get_input_embeddings()
        self._middle = _Middle()
        self.trunk = _around(model, 0, self._middle)
        self.head = Head(model)
        # Families without this argument (BLOOM) know positions only within blocks.
        self._numbers_positions = "position_ids" in signature(self.trunk.forward).parameters
        self._middle.as_tuple = self._takes_tuples()

    def forward(self, embeds_BSH: torch.Tensor, blocks: Blocks, first: int = 0) -> torch.Tensor:
        """Word embeddings [B, S, H], through `blocks`, to hidden states after the final norm.

        first: the position of the first of them, where others came before
        """
        passing = self._middle.passing
        passing.blocks = blocks
        numbers = {}
        if first and self._numbers_positions:
            last = first + embeds_BSH.shape[1]
            numbers["position_ids"] = torch.arange(first, last, device=embeds_BSH.device)[None]
        try:
            out = self.trunk(inputs_embeds=embeds_BSH, use_cache=False, **numbers)
            return out.last_hidden_state
        finally:
            passing.blocks = None

    @torch.no_grad()
    def _takes_tuples(self) -> bool:
        """Whether the family's forward takes the first of what a block returns, as BLOOM's does."""
        weight = self.words.weight
        out = self(weight.new_zeros(2, 3, weight.shape[1]), lambda hidden_BSH: hidden_BSH)
        return out.shape[:2] != (2, 3)  # it took the first row


class _Middle(nn.Module):
    """Stands in for the blocks: passes their input to the function that computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.as_tuple = False
        self.passing = _Passing()

    def forward(self, hidden_BSH: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        assert self.passing.blocks is not None
        hidden_BSH = self.passing.blocks(hidden_BSH)
        return (hidden_BSH,) if self.as_tuple else hidden_BSH


class Head(nn.Module):
    """Next-token logits by the family's own head, with its scaling or capping."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = _twin(model)
        setattr(self.model, model.base_model_prefix, _Given())

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm [B, T, H] -> [B, T, V]."""
        return self.model(inputs_embeds=hidden_BTH, use_cache=False).logits


class _Given(nn.Module):
    """Stands in for everything below the head: returns its input."""

    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_kwargs: Any) -> Any:
        return _Hidden(last_hidden_state=inputs_embeds)


@dataclass
class _Hidden(ModelOutput):
    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:  # heads pass on caches, router logits and more
        if name.startswith("__"):
            raise AttributeError(name)
