"""Keys and values of earlier positions, written in place.

transformers' own dynamic cache copies all of them for each new token.

Shapes: see `backbones/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class KeptLayer(DynamicLayer):
    """One block's keys and values, in tensors [B, heads, most positions, size]."""

    def __init__(self, most_positions: int) -> None:
        super().__init__()
        self._most, self.used = most_positions, 0
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def over(cls, keys: torch.Tensor, values: torch.Tensor, used: int) -> KeptLayer:
        """In these tensors, `used` positions of which are filled."""
        layer = cls(keys.shape[2])
        layer._all, layer.used, layer.is_initialized = (keys, values), used, True
        return layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends positions; all positions so far, [B, heads, positions, size]."""
        if self._all is None:
            both = (key_states, value_states)
            keys, values = (t.new_empty(*t.shape[:2], self._most, t.shape[3]) for t in both)
            self._all, self.is_initialized = (keys, values), True
        keys, values = self._all
        before, self.used = self.used, self.used + key_states.shape[2]
        keys[:, :, before : self.used] = key_states
        values[:, :, before : self.used] = value_states
        self.keys, self.values = keys[:, :, : self.used], values[:, :, : self.used]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.used


class KeptCache(Cache):
    """The layers of any blocks, by the indices that these have in their model."""

    def __init__(self, layers: Sequence[KeptLayer], indices: Sequence[int]) -> None:
        super().__init__(layers=list(layers))
        self._of = dict(zip(indices, layers, strict=True))

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of[layer_idx].update(key_states, value_states, *args, **kwargs)
