"""Steps of texts whose keys and values a server keeps: one task and one pass for all blocks.

Petals makes a task of each block if a step has more than 128 positions, and each block's pass would
make masks and positions again. The results are the same.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from petals.data_structures import InferenceMetadata
from petals.server.backend import TransformerBackend

from tune_app.models.kept import KeptCache, KeptLayer
from tune_app.models.parts import Span
from tune_app.models.threads import threads_for

_MOST_SPANS = 64  # that clients may ask for without one of them being made again


class CachedSteps:
    """What an inference pool computes. Runs in the server's computing process, in one thread."""

    def __init__(self, backends: dict[str, TransformerBackend]) -> None:
        self._backends = backends
        self._span = lru_cache(_MOST_SPANS)(self._make_span)

    @torch.inference_mode()
    def __call__(
        self,
        hidden_BSH: torch.Tensor,
        hypo_ids: torch.Tensor,
        infos: tuple[InferenceMetadata, ...],
        *prompts_BPH: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:
        """The blocks' output for positions that come after `prefix_length` others.

        hypo_ids: the rows' order among the kept ones, if it is another; or empty
        infos: of each block, with the handles of its keys and values
        prompts_BPH: of each block
        """
        backend, first = self._backends[infos[0].uid], infos[0]
        handles = chain.from_iterable(info.cache_handles for info in infos)
        with backend.memory_cache.use_cache(*handles) as tensors:
            backend._reorder_cache_inplace(tensors, hypo_ids)
            span = self._span(tuple(info.uid for info in infos))
            layers = [
                KeptLayer.over(keys, values, first.prefix_length)
                for keys, values in zip(tensors[::2], tensors[1::2], strict=True)
            ]
            cache = KeptCache(layers, span.indices)
            most = backend._estimate_max_chunk_length(hidden_BSH, first)  # attention's memory
            rows, positions, _ = hidden_BSH.shape
            parts = []
            with threads_for(span.products_per_position * rows * min(positions, most)):
                for start in range(0, positions, most):
                    part = slice(start, start + most)
                    deep = [None if prompt is None else prompt[:, part] for prompt in prompts_BPH]
                    parts.append(span(hidden_BSH[:, part], deep, cache))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),)

    def _make_span(self, uids: tuple[str, ...]) -> Any:
        return Span([self._backends[uid].module.block for uid in uids])
