"""Rows of several trials in one forward and one backward pass through the frozen blocks.

Rows of a causal model are independent, so each may have its own prompt and length:

    row of trial A:  a a a t t t t . .        a, b  prompt positions (3 of A, 2 of B)
    row of trial B:  b b t t t t t t .        t     text     .  padding, to the longest row

Deep prompts are *added* to hidden states, so a shorter prompt is padded with zeros. Each request
brings its own loss, divided by its own denominator, so a row's gradient is what it would be if its
trial were alone. A request may be split between rows; its parts add up.

Shapes: see `backbones/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tune_app.backbones.protocol import (
    PACK_TRAFFIC,
    Backbone,
    BackboneUnavailable,
    PackLimits,
    Traffic,
)
from tune_app.tasks.base import Sums

# (hidden_BTH after the final norm, prompt removed; which rows of the request these are)
#   -> (loss summed over those rows / the request's denominator, sums for the metrics)
Head = Callable[[torch.Tensor, slice], tuple[torch.Tensor, Sums]]


@dataclass(frozen=True)
class Request:
    """The rows of one step of one trial; all tensors detached, on the backbone's device."""

    embeds_BTH: torch.Tensor
    prompt_PH: torch.Tensor
    deep_LPH: torch.Tensor | None
    head: Head
    head_parameters: tuple[torch.Tensor, ...] = ()
    needs_grad: bool = True

    @property
    def rows(self) -> int:
        return self.embeds_BTH.shape[0]

    @property
    def row_tokens(self) -> int:
        """Positions of one row: prompt and text."""
        return self.prompt_PH.shape[0] + self.embeds_BTH.shape[1]


@dataclass
class Packs:
    """Sums over the packs that contained a request; other requests in them count too."""

    packs: int = 0
    rows: int = 0
    row_slots: int = 0  # rows that would have fitted
    requests: int = 0  # to servers of a swarm, and
    retries: int = 0  # how many of them failed

    def add(self, other: Packs) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Answer:
    """Loss and gradients of one request; gradients are None if none were requested."""

    loss: float = 0.0
    sums: Sums = field(default_factory=dict)
    prompt_PH: torch.Tensor | None = None
    deep_LPH: torch.Tensor | None = None
    head_parameters: list[torch.Tensor] = field(default_factory=list)
    packs: Packs = field(default_factory=Packs)

    def add(self, part: Answer) -> None:
        """Adds the answer for further rows of the same request."""
        self.loss += part.loss
        self.packs.add(part.packs)
        for name, value in part.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.prompt_PH = _sum(self.prompt_PH, part.prompt_PH)
        self.deep_LPH = _sum(self.deep_LPH, part.deep_LPH)
        if part.head_parameters:
            pairs = zip(self.head_parameters, part.head_parameters, strict=True)
            new = not self.head_parameters
            self.head_parameters = part.head_parameters if new else [a + b for a, b in pairs]


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True)
class Part:
    """Rows `rows` of request number `request`, as part of a pack."""

    request: int
    rows: slice

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


def plan(sizes: Sequence[tuple[int, int]], limits: PackLimits) -> list[list[Part]]:
    """Distributes requests over packs, none of which exceeds the limits.

    sizes: (rows, positions of a row) of each request
    Requests of similar length share a pack (longest first), because all rows of a pack are padded
    to the longest. A row that is longer than the limit is alone in its pack; `check_longest_row`
    prevents that.
    """
    packs: list[list[Part]] = []
    width = free_rows = 0  # of the pack being filled
    for request in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        rows, row_tokens = sizes[request]
        start = 0
        while start < rows:
            if not free_rows:
                packs.append([])
                width = row_tokens
                free_rows = max(1, limits.rows(width))
            taken = min(rows - start, free_rows)
            packs[-1].append(Part(request, slice(start, start + taken)))
            start, free_rows = start + taken, free_rows - taken
    return packs


def assemble(
    requests: Sequence[Request], parts: Sequence[Part]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pack's input embeddings [B, S, H] and deep prompts [L, B, P, H] (None if there are
    none)."""
    chosen = [requests[part.request] for part in parts]
    first, width = chosen[0].embeds_BTH, max(request.row_tokens for request in chosen)
    embeds_BSH = first.new_zeros(sum(map(len, parts)), width, first.shape[2])
    deep_LPHs = [request.deep_LPH for request in chosen if request.deep_LPH is not None]
    deep_LBPH = None
    if deep_LPHs:
        longest = max(deep.shape[1] for deep in deep_LPHs)
        deep_LBPH = first.new_zeros(deep_LPHs[0].shape[0], len(embeds_BSH), longest, first.shape[2])
    at = 0
    for part, request in zip(parts, chosen, strict=True):
        rows, prompt_tokens = slice(at, at + len(part)), len(request.prompt_PH)
        embeds_BSH[rows, :prompt_tokens] = request.prompt_PH.to(first.dtype)
        embeds_BSH[rows, prompt_tokens : request.row_tokens] = request.embeds_BTH[part.rows]
        if deep_LBPH is not None and request.deep_LPH is not None:
            deep_LBPH[:, rows, : request.deep_LPH.shape[1]] = request.deep_LPH[:, None].to(
                first.dtype
            )
        at = rows.stop
    return embeds_BSH, deep_LBPH


def run_pack(
    backbone: Backbone, requests: Sequence[Request], parts: Sequence[Part]
) -> list[Answer | Exception]:
    """One forward and, if the requests need gradients, one backward pass over the parts.

    All requests of a pack have the same `needs_grad`. A head that raises fails only its own
    request. Raises what the blocks raise.
    """
    needs_grad = requests[parts[0].request].needs_grad
    PACK_TRAFFIC.set(traffic := Traffic())
    embeds_BSH, deep_LBPH = assemble(requests, parts)
    with torch.set_grad_enabled(needs_grad):
        leaves = [tensor for tensor in (embeds_BSH, deep_LBPH) if tensor is not None]
        for leaf in leaves:
            leaf.requires_grad_(needs_grad)
        hidden_BSH = backbone.blocks(embeds_BSH, deep_LBPH)
    grad_BSH = torch.zeros_like(hidden_BSH) if needs_grad else None
    answers: list[Answer | Exception] = []
    at = 0
    for part in parts:
        request, rows = requests[part.request], slice(at, at + len(part))
        text = slice(len(request.prompt_PH), request.row_tokens)
        try:
            answer, grad_BTH = _run_head(request, part, hidden_BSH[rows, text])
            if grad_BSH is not None and grad_BTH is not None:
                grad_BSH[rows, text] = grad_BTH
            answers.append(answer)
        except Exception as error:
            answers.append(error)
        at = rows.stop
    if needs_grad:
        grads = torch.autograd.grad(hidden_BSH, leaves, grad_BSH)
        _hand_out_gradients(requests, parts, answers, *grads)
    slots = max(len(embeds_BSH), backbone.limits.rows(embeds_BSH.shape[1]))
    packs = Packs(1, len(embeds_BSH), slots, traffic.requests, traffic.retries)
    for result in answers:
        if isinstance(result, Answer):
            result.packs.add(packs)
    return answers


def _run_head(
    request: Request, part: Part, hidden_BTH: torch.Tensor
) -> tuple[Answer, torch.Tensor | None]:
    hidden_BTH = hidden_BTH.detach().requires_grad_(request.needs_grad)
    with torch.set_grad_enabled(request.needs_grad):
        loss, sums = request.head(hidden_BTH, part.rows)
    answer = Answer(loss.item(), sums)
    if not request.needs_grad:
        return answer, None
    grad_BTH, *answer.head_parameters = torch.autograd.grad(
        loss, [hidden_BTH, *request.head_parameters]
    )
    return answer, grad_BTH


def _hand_out_gradients(
    requests: Sequence[Request],
    parts: Sequence[Part],
    answers: Sequence[Answer | Exception],
    grad_BSH: torch.Tensor,
    grad_LBPH: torch.Tensor | None = None,
) -> None:
    at = 0
    for part, answer in zip(parts, answers, strict=True):
        request, rows = requests[part.request], slice(at, at + len(part))
        at = rows.stop
        if isinstance(answer, Exception):
            continue
        prompt_tokens = len(request.prompt_PH)
        answer.prompt_PH = grad_BSH[rows, :prompt_tokens].sum(0, dtype=request.prompt_PH.dtype)
        if request.deep_LPH is not None and grad_LBPH is not None:
            deep_LBPH = grad_LBPH[:, rows, : request.deep_LPH.shape[1]]
            answer.deep_LPH = deep_LBPH.sum(1, dtype=request.deep_LPH.dtype)


def run_parts(
    backbone: Backbone, requests: Sequence[Request], parts: Sequence[Part]
) -> list[Answer | Exception]:
    """`run_pack`; if the blocks fail, each part is run alone, so that only its own trial fails."""
    try:
        return run_pack(backbone, requests, parts)
    except BackboneUnavailable as error:
        return [error] * len(parts)  # trying each part again would only take longer
    except Exception as error:
        if len(parts) == 1:
            return [error]
        return [run_parts(backbone, requests, [part])[0] for part in parts]
