"""The frozen model, wherever its blocks run: in this process or on a Petals swarm.

Shape legend, used all over the project: B rows, T text tokens, P prompt tokens, S = P + T tokens of
a row, H hidden size, L blocks, V vocabulary, C classes.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PackLimits:
    """What one pack may hold, known before anything is sent.

    `tokens_per_pack` counts padded tokens (rows x longest row), `pairs_per_pack` what attention
    matrices grow with (rows x longest row²; None: they are kept on a server, whose matter it is);
    `packs_in_flight` is how many packs may be computed at once (more than one hides the latency of
    a swarm).
    """

    tokens_per_pack: int
    packs_in_flight: int
    pairs_per_pack: int | None = None

    def rows(self, row_tokens: int) -> int:
        """Rows of so many positions that one pack may hold; 0 where not even one fits."""
        row_tokens = max(1, row_tokens)
        rows = self.tokens_per_pack // row_tokens
        if self.pairs_per_pack is not None:
            rows = min(rows, self.pairs_per_pack // row_tokens**2)
        return rows


@dataclass
class Traffic:
    """What a backbone has asked of its servers so far (all zero for a local one)."""

    requests: int = 0
    retries: int = 0


# Where the requests of the pack that this thread computes are counted as well.
PACK_TRAFFIC: ContextVar[Traffic] = ContextVar("PACK_TRAFFIC", default=Traffic())  # noqa: B039


@dataclass(frozen=True)
class SwarmHealth:
    """Who serves the blocks, as of the client's last look (a few seconds ago)."""

    servers: int
    blocks_served: int  # blocks that at least one of them holds


class BackboneUnavailable(RuntimeError):
    """The backbone itself is gone (no server answered in time): no trial's fault."""


class Session(Protocol):
    """Texts of one length that grow; what the blocks know of the positions so far is kept."""

    def extend(self, embeds_BSH: torch.Tensor) -> torch.Tensor:
        """Appends S positions, prompts among them; their hidden states after the final norm.

        [B, S, H] -> [B, S, H], without gradients. Raises BackboneUnavailable.
        """
        ...

    def close(self) -> None: ...


class Backbone(Protocol):
    """A frozen causal language model, cut where prompt tuning needs it.

    No parameter of it requires a gradient. Calls may come from several threads at once, up to
    `limits.packs_in_flight` of them.
    """

    hidden_size: int
    num_blocks: int
    dtype: torch.dtype
    device: torch.device
    limits: PackLimits
    traffic: Traffic

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Word embeddings [B, T, H]."""
        ...

    def blocks(self, embeds_BSH: torch.Tensor, deep_LBPH: torch.Tensor | None) -> torch.Tensor:
        """All blocks and the final norm: [B, S, H] -> [B, S, H], differentiable in both inputs.

        `deep_LBPH` is added to the first P positions of each block's input, as Petals does.
        Causal, no attention mask. Raises BackboneUnavailable.
        """
        ...

    def logits(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, T, V]."""
        ...

    def session(self, deep_LBPH: torch.Tensor | None, most_positions: int) -> Session:
        """A text of at most so many positions; deep prompts are added to its first P ones."""
        ...

    def health(self) -> SwarmHealth | None:
        """None where there is no swarm."""
        ...

    def close(self) -> None: ...
