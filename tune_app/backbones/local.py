"""A transformers model in this process, on CPU or CUDA."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from tune_app.backbones.protocol import PackLimits, Traffic
from tune_app.models.kept import KeptLayer
from tune_app.models.load_parts import blocks_of, load_whole
from tune_app.models.parts import Whole
from tune_app.models.threads import threads_for

# Share of the device's free memory that the activations of one pack may take.
_ACTIVATION_SHARE = 0.5
# More tokens than this in one pack gain nothing, because kernels are saturated long before.
_MOST_TOKENS, _MOST_TOKENS_CUDA = 4096, 65536
# Lengths of the two rows with which the memory of a pass is measured.
_SHORT, _LONG = 16, 48


class LocalBackbone:
    """Backbone over the whole model of transformers; see the protocol.

    Raises ConfigError if the folder has no model that can be used.
    """

    def __init__(
        self, model: str | Path, *, device: str, dtype: str, memory_share: float = 1.0
    ) -> None:
        """memory_share: how much of the machine's free memory this host may use, if there are
        several; a GPU has only one host"""
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self._model = load_whole(model, self.dtype).to(self.device)
        self._whole = Whole(self._model)
        self.hidden_size = self._model.config.get_text_config().hidden_size
        self.num_blocks = len(blocks_of(self._model))
        self.traffic = Traffic()
        self._memory_share = memory_share
        self.limits = self._limits()

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self._whole.words(tokens_BT)

    def blocks(self, embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
        return self._whole(embeds_BSH, deep_LBPH)

    def logits(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self._whole.head(hidden_BTH)

    def session(self, deep_LBPH: torch.Tensor | None, most_positions: int) -> LocalSession:
        return LocalSession(self._whole, deep_LBPH, most_positions)

    def health(self) -> None:
        return None

    def close(self) -> None:
        pass

    def _limits(self) -> PackLimits:
        """The largest packs whose activations for the backward pass fit into the memory budget.

        How much the blocks keep is measured on two short rows: one part grows with positions, the
        other with pairs of positions, if attention keeps its matrices or masks. Three times the
        size of the logits is added.
        """
        short, long = self._kept_bytes(_SHORT), self._kept_bytes(_LONG)
        per_pair = max(0, (long / _LONG - short / _SHORT) / (_LONG - _SHORT))
        per_token = long / _LONG - per_pair * _LONG
        per_token += 3 * self.dtype.itemsize * self._model.config.get_text_config().vocab_size
        budget = int(self._free_bytes() * _ACTIVATION_SHARE)
        most = _MOST_TOKENS_CUDA if self.device.type == "cuda" else _MOST_TOKENS
        tokens = min(most, int(budget / 2 / per_token))
        pairs = None if per_pair < 1 else int((budget - tokens * per_token) / per_pair)
        return PackLimits(tokens_per_pack=tokens, packs_in_flight=1, pairs_per_pack=pairs)

    def _kept_bytes(self, positions: int) -> int:
        """Bytes that the blocks keep for the backward pass of one row, without weights."""
        parts = [*self._model.parameters(), *self._model.buffers()]
        weights = {tensor.untyped_storage().data_ptr() for tensor in parts}
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        tokens_BT = torch.arange(positions, device=self.device)[None] % vocabulary
        embeds_BSH = self.embed(tokens_BT).detach().requires_grad_()
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            hidden_BSH = self._whole(embeds_BSH, None)
        del hidden_BSH  # not earlier: freed memory could be reused and counted only once
        return sum(kept.values())

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        import psutil

        return int(psutil.virtual_memory().available * self._memory_share)


class LocalSession:
    """Session of a LocalBackbone; see the protocol."""

    def __init__(self, whole: Whole, deep_LBPH: torch.Tensor | None, most_positions: int) -> None:
        self._whole, self._deep_LBPH = whole, deep_LBPH
        self._cache = DynamicCache(config=whole.trunk.config)
        self._cache.layers = [  # sliding windows stay as they are: they copy only the window
            KeptLayer(most_positions) if type(layer) is DynamicLayer else layer
            for layer in self._cache.layers
        ]

    @torch.no_grad()
    def extend(self, embeds_BSH: torch.Tensor) -> torch.Tensor:
        deep_LBPH, self._deep_LBPH = self._deep_LBPH, None  # for the first positions only
        rows, positions, _ = embeds_BSH.shape
        with threads_for(self._whole.products_per_position * rows * positions):
            return self._whole(embeds_BSH, deep_LBPH, self._cache)

    def close(self) -> None:
        pass
