"""Completes texts token by token, over a session that keeps keys and values.

transformers' `generate` could do this in process, but it samples with the global generator and does
not work on a swarm. So both backbones share this loop, which tests compare with `generate`. Shapes:
see `backbones/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from tune_app.apply.logits import next_token_logits
from tune_app.backbones.protocol import Session
from tune_app.tasks.data import Dataset
from tune_app.train.prompt_model import PromptTunedModel

# Largest difference between logits with and without a cache that counts as rounding, in standard
# deviations of the logits: kernels for one position and for many add up in different orders.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled: from the most likely ones with a total probability of
    top_p."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def chooser(sampling: Sampling | None) -> Callable[[torch.Tensor], int]:
    """Logits [V] -> the next token: the most likely one, or sampled with a separate generator."""
    if sampling is None:
        return lambda logits_V: int(logits_V.argmax())
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits_V: torch.Tensor) -> int:
        scores_BV = logits_V.float().cpu()[None]
        for warp in warpers:
            scores_BV = warp(torch.empty(0), scores_BV)  # does not use the tokens
        return int(torch.multinomial(scores_BV.softmax(-1), 1, generator=generator))

    return draw


def continuation(
    model: PromptTunedModel,
    tokens: Sequence[int],
    most_new: int,
    choose: Callable[[torch.Tensor], int],
) -> Iterator[int]:
    """Up to `most_new` tokens after `tokens` (at least one).

    The first logits that depend on the cache are also computed without it. If the two differ by
    more than rounding, as on servers whose cache is wrong for a family, each further token takes a
    pass over the whole text. Raises BackboneUnavailable.
    """
    tokens = list(tokens)
    with closing(_Kept(model, len(tokens) + most_new)) as kept:
        logits_V, keeps = kept.next_logits(tokens), True
        for number in range(most_new):
            tokens.append(choose(logits_V))
            yield tokens[-1]
            if number + 1 == most_new:
                return
            if keeps:
                logits_V = kept.next_logits(tokens[-1:])
            if number == 0:
                keeps = _is_rounding(logits_V, next_token_logits(model, tokens))
            if not keeps:
                logits_V = next_token_logits(model, tokens)


class _Kept:
    """A text whose keys and values the backbone keeps; the tuned prompts come first."""

    def __init__(self, model: PromptTunedModel, most_tokens: int) -> None:
        self._model, self._most_tokens = model, most_tokens
        self._session: Session | None = None

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[V]: the logits of the token after all tokens so far and these."""
        backbone = self._model.backbone
        embeds_BSH = backbone.embed(torch.tensor([list(tokens)], device=backbone.device))
        if self._session is None:
            request = self._model.request(Dataset([list(tokens)]).batch([0]), needs_grad=False)
            prompt_BPH = request.prompt_PH[None].to(embeds_BSH.dtype)
            embeds_BSH = torch.cat([prompt_BPH, embeds_BSH], dim=1)
            deep_LPH = request.deep_LPH
            self._session = backbone.session(
                None if deep_LPH is None else deep_LPH[:, None].to(embeds_BSH.dtype),
                prompt_BPH.shape[1] + self._most_tokens,
            )
        return backbone.logits(self._session.extend(embeds_BSH)[:, -1:])[0, 0]

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def _is_rounding(logits_V: torch.Tensor, others_V: torch.Tensor) -> bool:
    difference = (logits_V - others_V).abs().max()
    return bool(difference <= _ROUNDING[logits_V.dtype] * others_V.float().std())
