"""A transformers model in this process, on CPU or CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tune_app.backbones import PackLimits, Traffic

# Share of the device's free memory that the activations of one pack may take.
_ACTIVATION_SHARE = 0.25
# More tokens than this in one pack gain nothing: kernels are saturated well before.
_MOST_TOKENS = {"cpu": 4096, "cuda": 65536}


class LocalBackbone:
    """Backbone over `AutoModelForCausalLM.from_pretrained(model)`; see the protocol."""

    def __init__(self, model: str | Path, *, device: str, dtype: str) -> None:
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
        self.limits = PackLimits(tokens_per_pack=self._tokens_that_fit(), packs_in_flight=1)
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

    def _tokens_that_fit(self) -> int:
        """Tokens whose activations, kept for the backward pass, fit into the memory bound.

        About 34 activations of the hidden size for each token and block (Korthikanti et al. 2022,
        "Reducing Activation Recomputation", eq. 1, in units of 2 bytes) and the logits thrice.
        """
        config, item = self._model.config, torch.finfo(self.dtype).bits // 8
        per_token = item * (17 * self.hidden_size * self.num_blocks + 3 * config.vocab_size)
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            import psutil

            free = psutil.virtual_memory().available
        return max(
            1, min(_MOST_TOKENS[self.device.type], int(free * _ACTIVATION_SHARE / per_token))
        )
