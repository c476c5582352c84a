"""The frozen model, wherever its blocks run: in this process or on a Petals swarm.

Shape legend, used throughout the project: B rows, T text tokens, P prompt tokens, S = P + T tokens
of a row, H hidden size, L blocks, V vocabulary, C classes.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PackLimits:
    """How large a pack may be.

    tokens_per_pack: padded tokens (rows x longest row)
    pairs_per_pack: rows x longest row², which the size of attention matrices is proportional to;
        None: they are on a server
    packs_in_flight: how many packs may be computed concurrently (more than one hides the latency of
        a swarm)
    """

    tokens_per_pack: int
    packs_in_flight: int
    pairs_per_pack: int | None = None

    def rows(self, row_tokens: int) -> int:
        """How many rows of this length fit into one pack; 0 if not even one does."""
        row_tokens = max(1, row_tokens)
        rows = self.tokens_per_pack // row_tokens
        if self.pairs_per_pack is not None:
            rows = min(rows, self.pairs_per_pack // row_tokens**2)
        return rows


@dataclass
class Traffic:
    """Requests that a backbone has sent to servers so far (all zero for a local one)."""

    requests: int = 0
    retries: int = 0


# Also counts the requests of the pack that the current thread computes.
PACK_TRAFFIC: ContextVar[Traffic] = ContextVar("PACK_TRAFFIC", default=Traffic())  # noqa: B039


@dataclass(frozen=True)
class SwarmHealth:
    """The state of the servers when the client last looked (a few seconds ago)."""

    servers: int
    blocks_served: int  # blocks that at least one of them has


class BackboneUnavailable(RuntimeError):
    """The backbone itself is gone (no server answered in time); the trial is not to blame."""


class Session(Protocol):
    """Texts of equal length that grow; keys and values of the positions so far are kept."""

    def extend(self, embeds_BSH: torch.Tensor) -> torch.Tensor:
        """Appends S positions, prompts among them; their hidden states after the final norm.

        [B, S, H] -> [B, S, H], without gradients. Raises BackboneUnavailable.
        """
        ...

    def close(self) -> None: ...


class Backbone(Protocol):
    """A frozen causal language model, divided where prompt tuning needs it.

    None of its parameters requires a gradient. Up to `limits.packs_in_flight` threads may call it
    concurrently.
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
        """A text of at most `most_positions`; deep prompts are added to its first P positions."""
        ...

    def health(self) -> SwarmHealth | None:
        """None if there is no swarm."""
        ...

    def close(self) -> None: ...
