"""What transformers alone computes: the references of tests and of the family table.

Shares no code with tune_app: whole models as `from_pretrained` gives them, with deep prompts added
by wrapping the `forward` of their blocks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

PROMPT = 3


def open_whole(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def add_deep_prompts(model: Any, deep_LBPH: torch.Tensor) -> None:
    """Adds them to the first P positions of each block's input, for all passes to come."""
    base = model.base_model
    blocks = base.layers if hasattr(base, "layers") else base.h
    for deep_BPH, block in zip(deep_LBPH, blocks, strict=True):

        def forward(
            hidden: torch.Tensor, *args: Any, deep=deep_BPH, inner=block.forward, **kwargs: Any
        ) -> Any:
            filled = F.pad(deep, (0, 0, 0, hidden.shape[1] - deep.shape[1]))
            return inner(hidden + filled, *args, **kwargs)

        block.forward = forward


def loss_and_gradients(trial: Any, task: str, folder: Path) -> tuple[torch.Tensor, ...]:
    """(loss, gradients of prompt, deep prompts and head): one row at a time, without padding."""
    leaf = {
        name: p.detach().cpu().clone().requires_grad_()
        for name, p in trial.model.named_parameters()
    }
    prompt = leaf["prompt_embeddings"]
    deep, score = leaf.get("intermediate_prompt_embeddings"), leaf.get("score")
    model = open_whole(folder, prompt.dtype)
    if deep is not None:
        deep_PLH = deep.view(len(prompt), -1, prompt.shape[1])
        add_deep_prompts(model, deep_PLH.transpose(0, 1)[:, None])
    total, count = 0.0, 0
    for tokens, label, length in zip(
        trial.batch.tokens_BT, trial.batch.labels, trial.batch.lengths_B.tolist(), strict=True
    ):
        text = model.get_input_embeddings()(tokens[None, :length])
        embeds = torch.cat([prompt[None], text], dim=1)
        if task == "causal-lm":
            # as in Petals, no prompt position predicts anything, so nothing predicts token 0
            labels = torch.cat([torch.full((len(prompt) + 1,), -100), tokens[1:length]])
            weight, loss = length - 1, model(inputs_embeds=embeds, labels=labels[None]).loss
        else:
            hidden = model.base_model(inputs_embeds=embeds).last_hidden_state
            weight, loss = 1, F.cross_entropy(hidden[:, -1] @ score.T, label[None])
        total, count = total + weight * loss, count + weight
    loss = total / count
    loss.backward()
    grads = [None if weight is None else weight.grad for weight in (prompt, deep, score)]
    return loss.detach(), *grads


@dataclass(frozen=True)
class Differences:
    """Largest difference from the whole model, divided by its largest number."""

    hidden: float
    logits: float
    prompt: float  # of the gradients, with deep prompts
    prompt_alone: float
    deep: float

    @property
    def largest(self) -> float:
        return max(asdict(self).values())


def differences(folder: Path, backbone: Any) -> Differences:
    """The backbone and the whole model of its folder, on the same padded rows."""
    generator = torch.Generator().manual_seed(1)
    device = backbone.device
    whole = open_whole(folder, backbone.dtype).to(device)
    words = whole.get_input_embeddings().weight
    lengths = torch.tensor([12, 9, 5])
    real_BT = torch.arange(12) < lengths[:, None]
    tokens_BT = torch.randint(3, len(words), real_BT.shape, generator=generator) * real_BT
    real_BT, tokens_BT = real_BT.to(device), tokens_BT.to(device)
    text = whole.get_input_embeddings()(tokens_BT)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, backbone.dtype)

    given_PH = normal(PROMPT, words.shape[1])
    given_LBPH = normal(backbone.num_blocks, len(lengths), *given_PH.shape)
    weight = normal(*real_BT.shape, len(words))

    def run(blocks: Any, logits: Any, deep: bool) -> list[torch.Tensor]:
        prompt, deep_LBPH = given_PH.clone().requires_grad_(), given_LBPH.clone().requires_grad_()
        embeds = torch.cat([prompt.expand(len(lengths), -1, -1), text], 1)
        hidden = blocks(embeds, deep_LBPH if deep else None)[:, PROMPT:]
        out = logits(hidden, embeds)
        (out.float().log_softmax(-1) * weight)[real_BT].sum().backward()
        grads = [prompt.grad, deep_LBPH.grad] if deep else [prompt.grad]
        return [hidden[real_BT], out[real_BT], *grads]

    def ours(deep: bool) -> list[torch.Tensor]:
        return run(backbone.blocks, lambda hidden, _: backbone.logits(hidden), deep)

    def theirs(deep: bool) -> list[torch.Tensor]:
        """The logits are those of the model's own forward, from its embeddings on."""
        kept = {}

        def blocks(embeds: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
            if deep_LBPH is not None:
                add_deep_prompts(whole, deep_LBPH)
            kept["logits"] = whole(inputs_embeds=embeds).logits
            return whole.base_model(inputs_embeds=embeds).last_hidden_state

        return run(blocks, lambda *_: kept["logits"][:, PROMPT:], deep)

    def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        ours, theirs = ours.detach(), theirs.detach()
        return float((ours - theirs).abs().max() / theirs.abs().max())

    plain = [apart(a, b) for a, b in zip(ours(False), theirs(False), strict=True)]
    deep = [apart(a, b) for a, b in zip(ours(True), theirs(True), strict=True)]
    return Differences(
        hidden=max(plain[0], deep[0]),
        logits=max(plain[1], deep[1]),
        prompt=deep[2],
        prompt_alone=plain[2],
        deep=deep[3],
    )


@torch.no_grad()
def generation_difference(folder: Path, backbone: Any) -> float:
    """Largest difference of the hidden states of a text that grows in a session, with deep prompts,
    from those of the whole model without a cache, as a part of the largest hidden state."""
    device = backbone.device
    model = open_whole(folder, backbone.dtype).to(device)
    generator = torch.Generator().manual_seed(3)
    words = model.get_input_embeddings()
    tokens = torch.randint(3, words.weight.shape[0], (1, 20), generator=generator).to(device)
    shape = (backbone.num_blocks, 1, PROMPT, backbone.hidden_size)
    deep_LBPH = torch.randn(shape, generator=generator, dtype=backbone.dtype).to(device)
    session = backbone.session(deep_LBPH, tokens.shape[1])
    parts = [tokens[:, :8], *tokens[:, 8:].split(1, dim=1)]
    ours = torch.cat([session.extend(backbone.embed(part)) for part in parts], dim=1)
    session.close()
    add_deep_prompts(model, deep_LBPH)
    theirs = model.base_model(inputs_embeds=words(tokens)).last_hidden_state
    return float((ours - theirs).abs().max() / theirs.abs().max())
