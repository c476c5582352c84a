"""A transformers model in this process, on CPU or CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tune_app.backbones.protocol import PackLimits, Traffic

# Share of the device's free memory that the activations of one pack may take.
_ACTIVATION_SHARE = 0.5
# More tokens than this in one pack gain nothing: kernels are saturated well before.
_MOST_TOKENS, _MOST_TOKENS_CUDA = 4096, 65536
# Numbers kept for the backward pass, per token, block and unit of the hidden size, attention
# matrices apart. 17 is Korthikanti et al. 2022, "Reducing Activation Recomputation", eq. 1 (34
# bytes in half precision); transformers' BLOOM keeps every step of its gelu, four times as wide.
_ACTIVATIONS = {"llama": 17, "falcon": 17, "bloom": 35}


class LocalBackbone:
    """Backbone over `AutoModelForCausalLM.from_pretrained(model)`; see the protocol."""

    def __init__(
        self, model: str | Path, *, device: str, dtype: str, memory_share: float = 1.0
    ) -> None:
        """`memory_share` of the machine's free memory is for this one of several hosts; a GPU has
        one host."""
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self._model = AutoModelForCausalLM.from_pretrained(str(model), torch_dtype=self.dtype)
        self._model.to(self.device).eval().requires_grad_(False)
        base = self._model.base_model
        layers = base.layers if hasattr(base, "layers") else base.h
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._deep_prompt_hook(index))
        self.hidden_size = self._model.config.hidden_size
        self.num_blocks = len(layers)
        self.traffic = Traffic()
        self._memory_share = memory_share
        self.limits = self._limits()
        self._deep_LBPH: torch.Tensor | None = None
        self._lock = threading.Lock()  # the hooks read what blocks() was called with

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self._model.get_input_embeddings()(tokens_BT)

    def blocks(self, embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
        with self._lock:
            self._deep_LBPH = deep_LBPH
            try:
                out = self._model.base_model(inputs_embeds=embeds_BSH, use_cache=False)
            finally:
                self._deep_LBPH = None
        return out.last_hidden_state

    def logits(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self._model.get_output_embeddings()(hidden_BTH)

    def health(self) -> None:
        return None

    def close(self) -> None:
        pass

    def _deep_prompt_hook(self, index: int) -> Callable[[Any, Any], Any]:
        def add_deep_prompt(module: Any, args: Any) -> Any:
            if self._deep_LBPH is None:
                return None
            hidden_BSH, deep_BPH = args[0], self._deep_LBPH[index]
            prefix = hidden_BSH[:, : deep_BPH.shape[1]] + deep_BPH
            return (torch.cat([prefix, hidden_BSH[:, deep_BPH.shape[1] :]], dim=1), *args[1:])

        return add_deep_prompt

    def _limits(self) -> PackLimits:
        """So large that the activations kept for the backward pass fit into the memory bound.

        For each token `_ACTIVATIONS` times the hidden size in each block, and the logits thrice;
        for each pair of positions, head and block the attention's softmax, which transformers
        computes in float32, and its copy in the dtype of the model where that is another one.
        """
        config, item = self._model.config, self.dtype.itemsize
        width = _ACTIVATIONS.get(config.model_type, _ACTIVATIONS["llama"]) * self.hidden_size
        per_token = item * (width * self.num_blocks + 3 * config.vocab_size)
        per_pair = (4 + item * (item != 4)) * config.num_attention_heads * self.num_blocks
        budget = int(self._free_bytes() * _ACTIVATION_SHARE)
        most = _MOST_TOKENS_CUDA if self.device.type == "cuda" else _MOST_TOKENS
        tokens = min(most, budget // 2 // per_token)
        return PackLimits(
            tokens_per_pack=tokens,
            packs_in_flight=1,
            pairs_per_pack=(budget - tokens * per_token) // per_pair,
        )

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        import psutil

        return int(psutil.virtual_memory().available * self._memory_share)
