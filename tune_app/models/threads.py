"""How many threads compute a short step of a small model: one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Below this many products, a block's kernels take less time than threads need to wait for each
# other; on a busy machine, where one of them may not be running, that is most of the time. A token
# of the demo model (200,000 in a block) takes 1.4 ms with one thread; with two, 3.5 on a busy
# machine with two cores.
_LEAST_PRODUCTS = 2_000_000


def products_per_position(block: nn.Module) -> int:
    """About as many as a block has weights."""
    return sum(weight.numel() for weight in block.parameters())


@contextmanager
def threads_for(products: int) -> Iterator[None]:
    """Computes with one thread of torch if a block has only this many products to compute."""
    threads = torch.get_num_threads()
    if threads == 1 or products >= _LEAST_PRODUCTS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
