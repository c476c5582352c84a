"""How prompts are initialised.

A vector drawn from normal(0, 1) is far longer than a word's: 8 times in SmolLM2-135M, 14 times in
the demo model. Words of the vocabulary are vectors that the model knows. PEFT measured 25 % against
36 % on MetaMathQA (peft#2824); our measurements are in benchmarks/results/prompt_quality.md.

    normal  normal(0, 1), as nn.Embedding in Petals and in PEFT (its RANDOM): the documented default
    vocab   the words of sampled frequent tokens: "sampled vocabulary" of Lester et al. 2021, "The
            Power of Scale for Parameter-Efficient Prompt Tuning", section 3.2, which samples from
            the 5,000 most frequent ones; PEFT's SAMPLE_VOCAB takes any token
    text    the words of --init-text, repeated or cut to the prompt's length: PEFT's TEXT
    labels  a class name for each prompt token, the mean of its tokens; the remaining tokens are
            initialised as in vocab: "class label" of Lester et al. 2021, section 3.2

Deep prompts are added to hidden states, so with a `deep_init` of zero training starts as if there
were none; normal(0, 1) is Petals' choice.
"""

from __future__ import annotations

import torch

from tune_app.backbones.protocol import Backbone
from tune_app.run.trial_config import TrialConfig
from tune_app.tasks.start_tokens import StartTokens


def initial_prompt(
    normal_PH: torch.Tensor,
    config: TrialConfig,
    start: StartTokens,
    backbone: Backbone,
    generator: torch.Generator,
) -> torch.Tensor:
    """[P, H], float32: the initial prompt; `normal_PH` itself if init is normal.

    Words are what `backbone.embed` gives to the blocks, so for models that scale their embeddings
    there, they are scaled too. Raises ValueError if `start` has no tokens for this init.
    """
    if config.init == "normal":
        return normal_PH
    tokens = {"vocab": start.frequent, "text": start.text, "labels": start.class_names}
    if not tokens[config.init] or not all(start.class_names):
        raise ValueError(f"init {config.init!r}: the task has no tokens for it")
    length = config.prompt_length

    def words(ids: list[int]) -> torch.Tensor:
        return backbone.embed(torch.tensor([ids], device=backbone.device))[0].float()

    def sampled(size: int) -> list[int]:
        """`size` of the frequent tokens, all different if there are enough."""
        order = torch.randperm(len(start.frequent), generator=generator).tolist()
        return [start.frequent[order[i % len(order)]] for i in range(size)]

    if config.init == "vocab":
        return words(sampled(length))
    if config.init == "text":
        return words([start.text[i % len(start.text)] for i in range(length)])
    chosen = torch.randperm(len(start.class_names), generator=generator).tolist()[:length]
    rows = [words(list(start.class_names[i])).mean(0, keepdim=True) for i in chosen]
    if len(rows) < length:
        rows.append(words(sampled(length - len(rows))))
    return torch.cat(rows)
