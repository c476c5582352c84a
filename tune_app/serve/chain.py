"""Passes through a server's consecutive blocks as single tasks, with graphs kept in between.

Kept graphs are limited in size and age, which bounds the cost of clients that never send the
backward pass. For a client that names no graphs, none are kept.

Shapes: L requested blocks, B rows, S positions, P prompt positions, H hidden size.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

import tune_app.petals_compat  # noqa: F401
from petals.server.backend import TransformerBackend

_MOST_AGE_S = 60.0  # how long a graph is kept
_SHARE_OF_FREE_MEMORY = 0.25  # how much graphs may take

_Gradients = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Graph:
    """A forward pass that waits for its backward pass, under the client's name for it."""

    name: str
    uids: tuple[str, ...]
    inputs: tuple[torch.Tensor, ...]  # hidden states [B, S, H] and prompts [L, B, P, H], if any
    output_BSH: torch.Tensor
    num_bytes: int
    made_at: float


class Chain:
    """Forward and backward passes through consecutive blocks, one task each.

    Runs in the server's computing process, in one thread.
    """

    def __init__(
        self,
        backends: dict[str, TransformerBackend],
        free_bytes: Callable[[], int],
        most_age_s: float = _MOST_AGE_S,
    ) -> None:
        """`free_bytes` returns the free memory of the device that holds the graphs."""
        self._backends, self._free_bytes, self._most_age_s = backends, free_bytes, most_age_s
        self._kept: list[_Graph] = []  # the oldest first
        self._lock, self._will_forget = threading.Lock(), False
        # Size of a graph per token and block, and the number of positions at which it was measured.
        self._token_bytes, self._positions = 0.0, 1
        self._weights = {
            weight.untyped_storage().data_ptr()
            for backend in backends.values()
            for weight in [*backend.module.parameters(), *backend.module.buffers()]
        }

    def forward(
        self,
        hidden_BSH: torch.Tensor,
        prompts_LBPH: torch.Tensor | None,
        uids: tuple[str, ...],
        graph_name: str,
    ) -> tuple[torch.Tensor]:
        """Keeps the graph under its name, unless the name is empty or there is no room."""
        num_bytes = self._graph_bytes(hidden_BSH, uids)
        if not graph_name or num_bytes is None or not self._make_room(num_bytes):
            with torch.inference_mode():
                return (self._run(hidden_BSH, prompts_LBPH, uids),)
        inputs = _leaves(hidden_BSH, prompts_LBPH)
        with torch.enable_grad():
            output_BSH = self._run(inputs[0], _second(inputs), uids)
        graph = _Graph(graph_name, uids, inputs, output_BSH, num_bytes, time.monotonic())
        with self._lock:
            self._kept.append(graph)
            self._forget_later()
        return (output_BSH.detach().clone(),)  # it is passed on through shared memory

    def backward(
        self,
        grad_BSH: torch.Tensor,
        hidden_BSH: torch.Tensor | None,
        prompts_LBPH: torch.Tensor | None,
        uids: tuple[str, ...],
        graph_name: str,
    ) -> _Gradients:
        """Gradients of hidden states and prompts; an empty tensor if the graph is not kept and
        there are no hidden states to compute it from."""
        graph = self._take(graph_name, uids, grad_BSH.shape)
        if graph is not None:
            return torch.autograd.grad(graph.output_BSH, graph.inputs, grad_BSH)
        if hidden_BSH is None:
            return (torch.empty(0),)
        num_bytes = self._graph_bytes(hidden_BSH, uids)
        if num_bytes is None or not self._make_room(num_bytes):
            return self._backward_by_block(hidden_BSH, grad_BSH, prompts_LBPH, uids)
        inputs = _leaves(hidden_BSH, prompts_LBPH)
        with torch.enable_grad():
            output_BSH = self._run(inputs[0], _second(inputs), uids)
        return torch.autograd.grad(output_BSH, inputs, grad_BSH)

    def _run(
        self, hidden_BSH: torch.Tensor, prompts_LBPH: torch.Tensor | None, uids: Sequence[str]
    ) -> torch.Tensor:
        for index, uid in enumerate(uids):
            prompt_BPH = None if prompts_LBPH is None else prompts_LBPH[index]
            hidden_BSH = self._block(uid, hidden_BSH, prompt_BPH)
        return hidden_BSH

    def _block(
        self, uid: str, hidden_BSH: torch.Tensor, prompt_BPH: torch.Tensor | None
    ) -> torch.Tensor:
        if prompt_BPH is not None:
            length = prompt_BPH.shape[1]
            prompted = hidden_BSH[:, :length] + prompt_BPH
            hidden_BSH = torch.cat([prompted, hidden_BSH[:, length:]], dim=1)
        (hidden_BSH,) = self._backends[uid].module(hidden_BSH)
        return hidden_BSH

    def _backward_by_block(
        self,
        hidden_BSH: torch.Tensor,
        grad_BSH: torch.Tensor,
        prompts_LBPH: torch.Tensor | None,
        uids: Sequence[str],
    ) -> _Gradients:
        """With one block's graph at a time in memory, as Petals does."""
        prompts = [None] * len(uids) if prompts_LBPH is None else list(prompts_LBPH)
        into = [hidden_BSH]
        with torch.no_grad():
            for uid, prompt_BPH in list(zip(uids, prompts, strict=True))[:-1]:
                into.append(self._block(uid, into[-1], prompt_BPH))
        grads_LBPH = []
        for uid, prompt_BPH, before in reversed(list(zip(uids, prompts, into, strict=True))):
            inputs = _leaves(before, prompt_BPH)
            with torch.enable_grad(), self._measured(hidden_BSH):
                output_BSH = self._block(uid, inputs[0], _second(inputs))
            grad_BSH, *grad_prompt = torch.autograd.grad(output_BSH, inputs, grad_BSH)
            grads_LBPH += grad_prompt
        return (grad_BSH, torch.stack(grads_LBPH[::-1])) if grads_LBPH else (grad_BSH,)

    # ----------------------------------------------------------------------------- kept graphs

    @contextmanager
    def _measured(self, hidden_BSH: torch.Tensor) -> Iterator[None]:
        """Measures how much memory the graph of one block takes."""
        seen: dict[int, int] = {}

        def saved(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            yield
        rows, positions, _ = hidden_BSH.shape
        # Input and output are kept too, whether or not the block saves them.
        both = 2 * hidden_BSH.untyped_storage().nbytes()
        token_bytes = (sum(seen.values()) + both) / (rows * positions)
        if token_bytes > self._token_bytes:
            self._token_bytes, self._positions = token_bytes, positions

    def _graph_bytes(self, hidden_BSH: torch.Tensor, uids: Sequence[str]) -> int | None:
        """Upper bound; None if no block has been measured. Attention matrices grow with the square
        of the positions."""
        if not self._token_bytes:
            return None
        rows, positions, _ = hidden_BSH.shape
        longer = max(1.0, positions / self._positions)
        return int(len(uids) * rows * positions * self._token_bytes * longer)

    def _make_room(self, num_bytes: int) -> bool:
        """Drops the oldest graphs until one of this size has room. False if it is too large."""
        self._forget_old()
        with self._lock:
            kept = sum(graph.num_bytes for graph in self._kept)
            most = _SHARE_OF_FREE_MEMORY * (self._free_bytes() + kept)
            if num_bytes > most:
                return False
            while kept + num_bytes > most:
                kept -= self._kept.pop(0).num_bytes
        return True

    def _take(self, name: str, uids: tuple[str, ...], shape: torch.Size) -> _Graph | None:
        with self._lock:
            for index, graph in enumerate(self._kept):
                wanted = name and graph.name == name and graph.uids == uids
                if wanted and graph.output_BSH.shape == shape:
                    return self._kept.pop(index)
        return None

    def _forget_old(self) -> None:
        with self._lock:
            oldest = time.monotonic() - self._most_age_s
            self._kept = [graph for graph in self._kept if graph.made_at > oldest]

    def _forget_later(self) -> None:
        """Frees graphs even if no more requests come. Called with the lock held."""
        if self._will_forget:
            return
        self._will_forget = True

        def forget() -> None:
            self._forget_old()
            with self._lock:
                self._will_forget = False
                if self._kept:
                    self._forget_later()

        timer = threading.Timer(self._most_age_s, forget)
        timer.daemon = True
        timer.start()


def _leaves(
    hidden_BSH: torch.Tensor, prompts: torch.Tensor | None
) -> tuple[torch.Tensor] | tuple[torch.Tensor, torch.Tensor]:
    leaf_BSH = hidden_BSH.detach().requires_grad_()
    return (leaf_BSH,) if prompts is None else (leaf_BSH, prompts.detach().requires_grad_())


def _second(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    return inputs[1] if len(inputs) == 2 else None


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
