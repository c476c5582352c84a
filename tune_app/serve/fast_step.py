"""A faster training step on a server, with Petals' protocol.

In Petals, each block of a request is a separate task that goes through pipes and shared memory, and
the backward pass computes every block's forward pass again, most of them twice. Here all blocks of
a request are one task (`chain.py`), and if the client names the graph of a forward pass, it is kept
for the backward pass of that name. The results are the same, bit for bit.

What follows replaces functions and a class of Petals' server.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

import tune_app.petals_compat  # noqa: F401
from petals.server import handler as petals_handler
from petals.server import server as petals_server
from petals.server import block_functions
from petals.server.backend import TransformerBackend
from petals.utils.misc import is_dummy
from petals.utils.packaging import unpack_args_kwargs

from tune_app.serve.asking import NOT_KEPT
from tune_app.serve.cached_steps import CachedSteps
from tune_app.serve.chain import Chain, free_bytes
from tune_app.serve.direct_pool import DirectPool

# Of the request that the current task of the handler's event loop answers.
_METADATA: ContextVar[dict[str, Any]] = ContextVar("_METADATA")


def _merge_pools(backends: dict[str, TransformerBackend]) -> None:
    """One pool each for all blocks' forward passes, backward passes and steps with a cache."""
    pool = next(iter(backends.values())).forward_pool
    device = pool.device or torch.device("cpu")
    chain = Chain(backends, lambda: free_bytes(device))
    computed: dict[str, Callable[..., Sequence[torch.Tensor]]] = {
        "forward": chain.forward,
        "backward": chain.backward,
        "inference": CachedSteps(backends),
    }
    for kind, compute in computed.items():
        merged = DirectPool(
            compute,
            max_batch_size=pool.max_batch_size,
            device=pool.device,
            name=f"merged_{kind}",
        )
        for backend in backends.values():
            setattr(backend, f"{kind}_pool", merged)


async def _run_rpc_forward(
    *flat_tensors: torch.Tensor,
    requested_backends: Sequence[TransformerBackend],
    active_adapter: str = "",
    prioritizer: Any,
    points: float = 0,
    args_structure: Any = None,
) -> torch.Tensor:
    first = requested_backends[0]
    hidden_BSH, prompts_LBPH = _read(flat_tensors, args_structure, first.dtype)
    if hidden_BSH is None:
        raise ValueError("a forward pass needs hidden states")
    priority = prioritizer.prioritize(hidden_BSH, points=points, backend=first, type="forward")
    (hidden_BSH,) = await first.forward_pool.submit_task(
        hidden_BSH,
        prompts_LBPH,
        tuple(backend.name for backend in requested_backends),
        _graph_name(),
        priority=priority,
    )
    return hidden_BSH


async def _run_rpc_backward(
    *flat_tensors: torch.Tensor,
    requested_backends: Sequence[TransformerBackend],
    active_adapter: str = "",
    prioritizer: Any,
    points: float = 0,
    args_structure: Any = None,
) -> list[torch.Tensor]:
    first = requested_backends[0]
    hidden_BSH, grad_BSH, prompts_LBPH = _read(flat_tensors, args_structure, first.dtype)
    if grad_BSH is None or (hidden_BSH is None and not _graph_name()):
        raise ValueError("a backward pass needs hidden states and their gradients")
    priority = prioritizer.prioritize(grad_BSH, points=points, backend=first, type="backward")
    gradients = await first.backward_pool.submit_task(
        grad_BSH,
        hidden_BSH,
        prompts_LBPH,
        tuple(backend.name for backend in requested_backends),
        _graph_name(),
        priority=priority,
    )
    if not gradients[0].numel():
        raise LookupError(NOT_KEPT)
    return list(gradients)


def _graph_name() -> str:
    return str(_METADATA.get().get("graph", ""))


def _read(
    flat_tensors: Sequence[torch.Tensor], args_structure: Any, dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """The request's tensors in the blocks' dtype, None for omitted ones; prompts come last."""
    if args_structure is not None:
        flat_tensors, _ = unpack_args_kwargs(flat_tensors, args_structure)
    given = [None if t is None or is_dummy(t) else t.to(dtype) for t in flat_tensors]
    if any(state is not None and state.ndim != 3 for state in given[:-1]):
        raise ValueError("hidden states and their gradients must have three dimensions")
    return given


class TransformerConnectionHandler(petals_handler.TransformerConnectionHandler):
    """Petals' handler. Keeps its class name, because clients address it by that name."""

    def _get_active_adapter(self, metadata: dict[str, Any]) -> str:
        _METADATA.set(metadata)  # this is called once in each request's own task
        return super()._get_active_adapter(metadata)


def compute_fast(threads: int | None = None) -> None:
    """Applies this to the servers of this process; to be called before they are created.

    threads: torch threads of the computing thread; None: torch's own number
    """

    class Runtime(petals_server.RuntimeWithDeduplicatedPools):
        """The computing thread."""

        def run(self) -> None:
            # OpenMP makes threads for each thread that computes. If there are more than processors,
            # they sleep between kernels, and a token of a small model takes 68 ms instead of 42. So
            # the threads that loaded the blocks should have one each.
            if threads is not None:
                torch.set_num_threads(threads)
            super().run()

    petals_server.RuntimeWithDeduplicatedPools = Runtime
    petals_server.merge_inference_pools_inplace = _merge_pools
    block_functions.MAX_SHORT_INFERENCE_TOKENS = sys.maxsize  # above, each block is a task
    petals_server.TransformerConnectionHandler = TransformerConnectionHandler
    petals_handler.run_rpc_forward = _run_rpc_forward
    petals_handler.run_rpc_backward = _run_rpc_backward
