"""Prompt-tuned models for your own training loop, with the interface of Petals' classes.

    from tune_app.models import AutoDistributedModelForCausalLM

    model = AutoDistributedModelForCausalLM.from_pretrained(
        "Qwen/Qwen3-8B", initial_peers=[...], tuning_mode="deep_ptune", pre_seq_len=16
    )
    loss = model(input_ids=input_ids, labels=labels).loss

Names and arguments are those of petals 2.2, so its prompt tuning examples run if only the import is
changed. All families that transformers supports can be used, and without `initial_peers` the blocks
run in this process. A search packs the rows of many trials instead (`train/prompt_model.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, get_args

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.protocol import Backbone
from tune_app.models.folder import model_folder
from tune_app.run.search_config import ConfigError
from tune_app.run.trial_config import TuningMode
from tune_app.serve.checks import check_petals, dht_prefix_of
from tune_app.tasks.base import IGNORED
from tune_app.tasks.data import last_token


class _PromptTuned(nn.Module):
    """Trainable prompts around a frozen backbone, which is not a submodule, so that a state dict
    has only trained parameters."""

    def __init__(
        self, backbone: Backbone, model_config: Any, tuning_mode: str, pre_seq_len: int
    ) -> None:
        super().__init__()
        self._backbone = [backbone]
        self.config = model_config
        hidden = backbone.hidden_size
        # float32 and normal(0, 1), as in Petals.
        self.prompt_embeddings = nn.Embedding(pre_seq_len, hidden, device=backbone.device)
        self.intermediate_prompt_embeddings: nn.Embedding | None = None
        if tuning_mode == "deep_ptune":
            self.intermediate_prompt_embeddings = nn.Embedding(
                pre_seq_len, backbone.num_blocks * hidden, device=backbone.device
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: Sequence[str] = (),
        dht_prefix: str | None = None,
        tuning_mode: str = "ptune",
        pre_seq_len: int = 8,
        torch_dtype: torch.dtype = torch.float32,
        device: str | None = None,
        request_tokens: int | None = None,
        **options: Any,
    ) -> Self:
        """A model from a folder or a hub, in which only prompts and score head are trained.

        initial_peers: of a swarm that serves the blocks; without any, they run in this process
        dht_prefix: the blocks' name in the swarm; None: by Petals' rule for the model's name
        tuning_mode: ptune, or deep_ptune with a prompt for each block's input as well
        pre_seq_len: prompt tokens
        device: of the blocks in this process; None: cuda if available
        request_tokens: rows times positions that servers accept in a request; None: Petals' 1024
        options: num_labels for classification

        Raises ConfigError if something cannot be used, BackboneUnavailable if no server answers.
        """
        mistakes = check_petals() if initial_peers else []
        if tuning_mode not in get_args(TuningMode):
            mistakes.append(f"tuning_mode must be ptune or deep_ptune, got {tuning_mode!r}.")
        if pre_seq_len < 1:
            mistakes.append(f"pre_seq_len must be at least 1, got {pre_seq_len}.")
        if mistakes:
            raise ConfigError(mistakes)
        folder = model_folder(model)
        dtype = str(torch_dtype).removeprefix("torch.")
        backbone: Backbone
        if initial_peers:
            from tune_app.backbones.swarm import SwarmBackbone

            backbone = SwarmBackbone(
                folder,
                peers=initial_peers,
                dht_prefix=dht_prefix or dht_prefix_of(folder, model),
                dtype=dtype,
                request_tokens=request_tokens,
            )
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            backbone = LocalBackbone(folder, device=device, dtype=dtype)
        config = AutoConfig.from_pretrained(str(folder))
        return cls(backbone, config, tuning_mode, pre_seq_len, **options)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    def close(self) -> None:
        """Ends the connection to the swarm."""
        self.backbone.close()

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of the text [B, T, H] after the final norm."""
        backbone, rows = self.backbone, len(input_ids)
        text = backbone.embed(input_ids.to(backbone.device))
        prompt = self.prompt_embeddings.weight.to(text.dtype).expand(rows, -1, -1)
        deep_LBPH = None
        if self.intermediate_prompt_embeddings is not None:
            deep_PLH = self.intermediate_prompt_embeddings.weight.to(text.dtype).unflatten(
                1, (backbone.num_blocks, -1)
            )
            deep_LBPH = deep_PLH.transpose(0, 1)[:, None].expand(-1, rows, -1, -1)
        embeds_BSH = torch.cat([prompt, text], dim=1)
        return backbone.blocks(embeds_BSH, deep_LBPH)[:, prompt.shape[1] :]


class AutoDistributedModelForCausalLM(_PromptTuned):
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits of the text [B, T, V], and with labels the mean loss over predicted tokens.

        Labels are the token ids, or -100 for tokens that do not count (padding). Rows must be
        padded on the right; otherwise raises ValueError.
        """
        _check_padding(attention_mask)
        logits = self.backbone.logits(self._hidden(input_ids))
        loss = None
        if labels is not None:
            predicted = labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), predicted.flatten(), ignore_index=IGNORED
            )
        return CausalLMOutput(loss=loss, logits=logits)


class AutoDistributedModelForSequenceClassification(_PromptTuned):
    def __init__(self, *args: Any, num_labels: int = 2) -> None:
        super().__init__(*args)
        backbone = self.backbone
        self.score = nn.Linear(backbone.hidden_size, num_labels, bias=False, device=backbone.device)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of the classes [B, C] at each row's last token, and with labels the mean loss.

        Rows must be padded on the right; otherwise raises ValueError. Without a mask, a row ends
        before its padding tokens (`model.config.pad_token_id`), as in transformers.
        """
        _check_padding(attention_mask)
        if attention_mask is None:
            padding = getattr(self.config, "pad_token_id", None)
            attention_mask = torch.ones_like(input_ids) if padding is None else input_ids != padding
        positions = torch.arange(1, input_ids.shape[1] + 1, device=attention_mask.device)
        lengths_B = (attention_mask * positions).amax(1).clamp(min=1)
        pooled_BH = last_token(self._hidden(input_ids), lengths_B.to(self.backbone.device))
        logits = self.score(pooled_BH.to(self.score.weight.dtype))
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _check_padding(attention_mask: torch.Tensor | None) -> None:
    """Blocks take no mask, and need none if padding comes after all real positions."""
    if attention_mask is not None and bool((attention_mask.diff(dim=1) > 0).any()):
        raise ValueError(
            "rows must be padded on the right, but a row of attention_mask goes from 0 to 1; set "
            'tokenizer.padding_side = "right"'
        )
