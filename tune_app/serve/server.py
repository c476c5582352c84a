"""Petals' server with the blocks of any family that transformers supports.

Petals' server needs a model's config, its blocks and the shapes of their caches. These three are
provided here for every family, from `models/parts.py`; the rest is Petals'. The network protocol is
unchanged: clients and servers of Petals' own model classes work with it.
"""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tune_app import petals_compat
from hivemind import TensorDescriptor
from petals.server import server as petals_server
from petals.server.backend import TransformerBackend
from petals.utils.convert_block import QuantType

from tune_app.models.identity import ModelIdentity
from tune_app.models.kept import KeptCache, KeptLayer
from tune_app.models.load_parts import load_blocks
from tune_app.models.parts import Block
from tune_app.serve.asking import KEEPS_GRAPHS
from tune_app.serve.fast_step import compute_fast
from tune_app.serve.processes import hivemind_ends_with_us

# Prefix of what our servers announce instead of a hub's address.
_OUR_WEIGHTS = "weights:"
_OPTIONS: dict[str, Any] = {  # of Petals' own `Server`
    "throughput": 1.0,  # without a number, Petals measures the internet connection
    "num_handlers": 1,  # each is a separate process
    "quant_type": QuantType.NONE,
    "skip_reachability_check": True,
    "reachable_via_relay": False,
    "use_relay": False,
    "use_auto_relay": False,
    "auto_nat": False,
    "nat_port_map": False,  # would look for a router
}


class ServedBlock(petals_compat.TensorParallel):
    """A block as Petals' server calls it."""

    output_device_index = 0

    def __init__(self, block: Block, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.block = block
        self.num_heads = num_heads
        self.cache_shape = self._cache_shape(hidden_size)

    @property
    def devices(self) -> list[torch.device]:
        return [next(self.parameters()).device]

    @property
    def module_shards(self) -> list[ServedBlock]:
        return [self]  # a property: as a submodule it would contain itself

    def forward(
        self,
        hidden_BSH: torch.Tensor,
        layer_past: KeptLayer | None = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, ...] | tuple[torch.Tensor, KeptLayer]:
        if not use_cache:
            return (self.block(hidden_BSH),)
        assert layer_past is not None  # with no positions at first
        cache = KeptCache([layer_past], [self.block.index])
        return self.block(hidden_BSH, cache), layer_past

    @torch.no_grad()
    def _cache_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, size of a key and of a value, measured on one token.

        The config is not enough for all families: Falcon keeps a key for each query head, and Qwen
        and Gemma have head sizes other than hidden size / heads.
        """
        layer, weight = KeptLayer(1), next(self.parameters())
        self(weight.new_zeros(1, 1, hidden_size), layer, use_cache=True)
        return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]


@dataclass
class _Config:
    """What Petals' server reads from a model's config."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    dht_prefix: str | None = None
    attn_class: type = ServedBlock  # Petals reads its `num_heads`
    num_key_value_groups: int = (
        1  # for Petals' estimate of the cache size, which `_Backend` replaces
    )

    @classmethod
    def from_pretrained(cls, folder: str, **_options: Any) -> _Config:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
        )


class _Backend(TransformerBackend):
    """Petals' backend, whose blocks write new keys and values into the session's cache, instead of
    copying all of them for each token."""

    def get_inference_cache_descriptors(
        self, batch_size: int, max_length: int
    ) -> Sequence[TensorDescriptor]:
        heads, key_size, value_size = self.module.cache_shape
        return [
            TensorDescriptor(
                (batch_size, heads, max_length, size),
                dtype=self.dtype,
                device=self.module.devices[0],
            )
            for size in (key_size, value_size)
        ]

    def _select_layer_past(
        self, cache_tensors: Sequence[torch.Tensor], prefix_length: int
    ) -> KeptLayer:
        keys, values = cache_tensors
        return KeptLayer.over(keys, values, prefix_length)

    def _update_cache_inplace(self, *_args: Any) -> None:
        pass  # done by the block


def _load_block(
    folder: str, index: int, *, config: _Config, torch_dtype: torch.dtype, **_options: Any
) -> ServedBlock:
    """One at a time, so that at most one block is in memory besides those on a GPU."""
    block = Block(load_blocks(folder, [index], torch_dtype), index)
    return ServedBlock(block, config.num_attention_heads, config.hidden_size)


def _place_block(
    block: ServedBlock,
    _index: int,
    _config: _Config,
    devices: Sequence[torch.device],
    *_args: Any,
    **_options: Any,
) -> ServedBlock:
    return block.to(devices[0])


petals_server.AutoDistributedConfig = _Config
petals_server.TransformerBackend = _Backend
petals_server.convert_block = _place_block
# The check for reachability from outside would start a second p2pd for each server.
petals_server.ReachabilityProtocol.attach_to_dht = classmethod(lambda cls, dht: None)


def make_server(
    model: str | Path,
    blocks: range,
    *,
    dht_prefix: str,
    initial_peers: Sequence[str],
    host_maddrs: Sequence[str],
    announce_maddrs: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    max_batch_tokens: int = 8192,
    stock: bool = False,
    loaded: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> petals_server.Server:
    """A server of these blocks of the model in a folder; `run()` loads and serves them.

    It listens on `host_maddrs` only, and knows no peers other than `initial_peers`.
    device: in torch's notation; None: cuda if available
    threads: torch threads of the computing thread; None: torch's own number
    max_batch_tokens: rows times positions allowed in a request
    stock: compute as Petals' own server does, for comparisons
    loaded: called after each block with the number of blocks loaded
    options: further arguments of Petals' `Server`
    Raises ValueError if other servers have another model under this name.
    """
    hivemind_ends_with_us()
    if not stock:
        compute_fast(threads)
    counts = itertools.count(1)

    def load_block(*args: Any, **options: Any) -> ServedBlock:
        block = _load_block(*args, **options)
        loaded(next(counts))
        return block

    petals_server.load_pretrained_block = load_block
    server = petals_server.Server(
        initial_peers=list(initial_peers),
        dht_prefix=dht_prefix,
        converted_model_name_or_path=str(model),
        block_indices=f"{blocks.start}:{blocks.stop}",
        max_batch_size=max_batch_tokens,
        torch_dtype=dtype,
        device=device,
        host_maddrs=list(host_maddrs),
        announce_maddrs=announce_maddrs and list(announce_maddrs),
        **(_OPTIONS | options),
    )
    if not stock:
        server.server_info.version += KEEPS_GRAPHS
    weights = ModelIdentity.of(str(model), Path(model)).weights_fingerprint
    server.model_info.repository = _OUR_WEIGHTS + weights
    if initial_peers:
        _check_same_model(server)
    return server


def _check_same_model(server: petals_server.Server) -> None:
    """Raises ValueError if other servers have another model under the same name."""
    known = server.dht.get("_petals.models", latest=True)
    entry = known and known.value.get(server.dht_prefix)
    if not entry:
        return
    theirs, mine = petals_server.ModelInfo(**entry.value), server.model_info
    name = f"other servers of this swarm have another model under the name {server.dht_prefix!r}"
    if theirs.num_blocks != mine.num_blocks:
        raise ValueError(f"{name}: it has {theirs.num_blocks} blocks, not {mine.num_blocks}")
    told = theirs.repository or ""
    if told.startswith(_OUR_WEIGHTS) and told != mine.repository:
        raise ValueError(f"{name}: its weight files differ. All servers need the same files")
