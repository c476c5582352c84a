"""A server's merged step: the bits of Petals' own server, and bounds on what it keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tune_app.models.load_parts import load_blocks
from tune_app.models.parts import Block
from tune_app.serve import fast_step
from tune_app.serve.chain import Chain
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import PrivateSwarm, private_swarm

HIDDEN, BLOCKS, PROMPT = 32, 3, 4
UIDS = tuple(f"tiny.{index}" for index in range(BLOCKS))
PLENTY = 2**40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", layers=BLOCKS)


# ------------------------------------------------------------------------------- in this process


def test_of_a_servers_threads_only_the_computing_one_has_several_of_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or OpenMP has more threads than there are processors, and lets them sleep between kernels."""
    seen: list[int] = []
    base = fast_step.petals_server.RuntimeWithDeduplicatedPools
    monkeypatch.setattr(base, "run", lambda self: seen.append(torch.get_num_threads()))
    for module, name in (  # what `compute_fast` replaces, to have it back
        (fast_step.petals_server, "RuntimeWithDeduplicatedPools"),
        (fast_step.petals_server, "merge_inference_pools_inplace"),
        (fast_step.petals_server, "TransformerConnectionHandler"),
        (fast_step.block_functions, "MAX_SHORT_INFERENCE_TOKENS"),
        (fast_step.petals_handler, "run_rpc_forward"),
        (fast_step.petals_handler, "run_rpc_backward"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))

    before = torch.get_num_threads()  # and from now on this thread's
    fast_step.compute_fast(threads=before + 2)
    runtime = fast_step.petals_server.RuntimeWithDeduplicatedPools
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runtime.run, runtime.__new__(runtime)).result()

    assert (seen, torch.get_num_threads()) == ([before + 2], before)
    torch.set_num_threads(before)  # of threads to come


class Served(torch.nn.Module):
    """A block as Petals' backend holds it; counts its forward passes."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.passes = block, 0

    def forward(self, hidden_BSH: torch.Tensor) -> tuple[torch.Tensor]:
        self.passes += 1
        return (self.block(hidden_BSH),)


@pytest.fixture(scope="module")
def backends(folder: Path) -> dict[str, Any]:
    blocks = [Block(load_blocks(folder, [index], torch.float32), index) for index in range(BLOCKS)]
    return {
        uid: SimpleNamespace(module=Served(block)) for uid, block in zip(UIDS, blocks, strict=True)
    }


@pytest.fixture(scope="module")
def whole(folder: Path) -> torch.nn.ModuleList:
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    return model.model


def inputs(seed: int, *, deep: bool, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 9, HIDDEN, generator=generator)
    prompts = torch.randn(BLOCKS, rows, PROMPT, HIDDEN, generator=generator)
    return hidden, prompts if deep else None


def expected(whole: Any, hidden: torch.Tensor, prompts: torch.Tensor | None) -> list[torch.Tensor]:
    """Output and gradients by transformers' own layers, for a gradient of ones."""
    leaves = [hidden.clone().requires_grad_()]
    if prompts is not None:
        leaves.append(prompts.clone().requires_grad_())
    states = leaves[0]
    positions = torch.arange(states.shape[1])[None]
    rotary = whole.rotary_emb(states, positions)
    for index, layer in enumerate(whole.layers):
        if prompts is not None:
            prompted = states[:, :PROMPT] + leaves[1][index]
            states = torch.cat([prompted, states[:, PROMPT:]], dim=1)
        causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        states = layer(states, attention_mask=causal, position_embeddings=rotary)
    return [states.detach(), *torch.autograd.grad(states.sum(), leaves)]


def passes(backends: dict[str, Any]) -> int:
    return sum(backend.module.passes for backend in backends.values())


def step(chain: Chain, seed: int, *, deep: bool = False, keep: bool = True) -> list[torch.Tensor]:
    hidden, prompts = inputs(seed, deep=deep)
    name = f"step {seed}" if keep else ""
    (output,) = chain.forward(hidden, prompts, UIDS, name)
    return [output, *chain.backward(torch.ones_like(output), hidden, prompts, UIDS, name)]


@pytest.mark.parametrize("deep", [False, True])
def test_a_chain_gives_the_familys_own_output_and_gradients(backends, whole, deep: bool) -> None:
    chain = Chain(backends, lambda: PLENTY)
    by_block = step(chain, 0, deep=deep)  # nothing is known of a graph's size yet
    before = passes(backends)
    kept = step(chain, 0, deep=deep)
    assert passes(backends) - before == BLOCKS  # the backward pass needed no other forward pass
    again = step(chain, 0, deep=deep, keep=False)
    assert passes(backends) - before == 3 * BLOCKS
    for ours in (by_block, kept, again):
        for mine, theirs in zip(ours, expected(whole, *inputs(0, deep=deep)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for other in (kept, again):
        assert all(map(torch.equal, by_block, other))


def test_graphs_of_several_clients_are_told_apart(backends) -> None:
    chain = Chain(backends, lambda: PLENTY)
    alone = [step(chain, seed, deep=seed % 2 == 1) for seed in range(4)]
    given = [inputs(seed, deep=seed % 2 == 1) for seed in range(4)]
    outputs = [chain.forward(*both, UIDS, str(seed))[0] for seed, both in enumerate(given)]
    before = passes(backends)
    for seed in (2, 0, 3, 1):
        grads = chain.backward(torch.ones_like(outputs[seed]), None, None, UIDS, str(seed))
        assert all(map(torch.equal, [outputs[seed], *grads], alone[seed]))
    assert passes(backends) == before


def test_what_a_client_leaves_behind_is_bounded_in_bytes(backends) -> None:
    chain = Chain(backends, lambda: PLENTY)
    wanted = step(chain, 0)
    size = chain._graph_bytes(inputs(0, deep=False)[0], UIDS)
    assert size is not None

    # A quarter of what is free is for graphs: room for two of them and a half.
    chain._free_bytes = lambda: 10 * size - sum(graph.num_bytes for graph in chain._kept)
    for seed in range(5):
        chain.forward(*inputs(seed, deep=False), UIDS, str(seed))
        assert sum(graph.num_bytes for graph in chain._kept) <= 2.5 * size
    assert len(chain._kept) == 2
    # The one that was forgotten is computed again, with the same bits.
    hidden, _ = inputs(0, deep=False)
    assert not chain.backward(torch.ones_like(hidden), None, None, UIDS, "0")[0].numel()
    (again,) = chain.backward(torch.ones_like(hidden), hidden, None, UIDS, "0")
    assert torch.equal(again, wanted[1])

    chain._free_bytes = lambda: size  # not even one fits; nor does one of all blocks at once
    kept = list(chain._kept)
    assert all(map(torch.equal, step(chain, 0), wanted))
    assert [graph.made_at for graph in chain._kept] == [graph.made_at for graph in kept]


def test_a_graph_is_measured_as_large_as_it_is(backends) -> None:
    chain = Chain(backends, lambda: PLENTY)
    step(chain, 0)
    hidden, _ = inputs(1, deep=False, rows=64)
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        chain.forward(hidden, None, UIDS, "large")
    saved = {at: size for at, size in saved.items() if at not in chain._weights}
    (graph,) = chain._kept
    assert sum(saved.values()) <= graph.num_bytes <= 2 * sum(saved.values())


def test_what_nobody_asks_for_is_forgotten_in_time(backends) -> None:
    chain = Chain(backends, lambda: PLENTY, most_age_s=0.2)
    step(chain, 0)
    chain.forward(*inputs(0, deep=False), UIDS, "never asked for")
    assert len(chain._kept) == 1
    deadline = time.monotonic() + 10
    while chain._kept:  # without any other request
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_says_nothing_keeps_nothing(backends) -> None:
    chain = Chain(backends, lambda: PLENTY)
    step(chain, 0)
    chain.forward(*inputs(1, deep=True), UIDS, "")
    assert chain._kept == []


# ------------------------------------------------------------------------------- on real servers


@pytest.fixture(scope="module")
def swarms(folder: Path) -> Iterator[dict[str, PrivateSwarm]]:
    """Petals' own server, ours, and a chain with one of each."""
    with (
        private_swarm(ServeConfig(folder, threads=1, stock=True)) as stock,
        private_swarm(ServeConfig(folder, threads=1)) as ours,
        private_swarm(ServeConfig(folder, threads=1, blocks=(0, 2))) as first,
        private_swarm(
            ServeConfig(folder, threads=1, blocks=(2, 3), join=first.peers, stock=True)
        ) as second,
    ):
        yield {"stock": stock, "ours": ours, "chain": SimpleNamespace(
            peers=[*first.peers, *second.peers], dht_prefix=first.dht_prefix
        )}  # fmt: skip


@pytest.fixture(scope="module")
def clients(folder: Path, swarms: dict[str, PrivateSwarm]) -> Iterator[dict[str, Any]]:
    """Our client of each swarm, and Petals' own of our server."""
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
    from petals import ClientConfig, RemoteSequential

    from tune_app.backbones.swarm import SwarmBackbone, _Config

    opened = {
        name: SwarmBackbone(folder, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32")
        for name, swarm in swarms.items()
    }
    ours = swarms["ours"]
    plain = RemoteSequential(
        _Config(
            initial_peers=ours.peers,
            dht_prefix=ours.dht_prefix,
            num_hidden_layers=BLOCKS,
            max_retries=2,
        )
    )
    assert isinstance(plain.config, ClientConfig)
    yield {name: backbone._sequence for name, backbone in opened.items()} | {"plain": plain}
    for backbone in opened.values():
        backbone.close()
    manager = plain.sequence_manager
    manager.shutdown()
    RemoteExpertWorker.run_coroutine(manager.state.p2p.shutdown())
    manager.dht.shutdown()


def remote_step(sequence: Any, seed: int, *, deep: bool, follows: bool) -> list[torch.Tensor]:
    from tune_app.serve.asking import BACKWARD_FOLLOWS

    hidden, prompts = inputs(seed, deep=deep)
    leaves = [tensor.requires_grad_() for tensor in (hidden, prompts) if tensor is not None]
    BACKWARD_FOLLOWS.set(follows)
    output = sequence(hidden, prompts=prompts)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


@pytest.mark.swarm
@pytest.mark.parametrize("deep", [False, True])
def test_servers_and_clients_of_ours_and_of_petals_give_the_same_bits(clients, deep) -> None:
    for seed in range(3):  # the first step is not kept, the others are
        reference = remote_step(clients["stock"], seed, deep=deep, follows=True)
        for name in ("ours", "chain", "plain"):
            got = remote_step(clients[name], seed, deep=deep, follows=name != "plain")
            assert all(map(torch.equal, got, reference)), (name, seed)


@pytest.mark.swarm
def test_our_servers_get_the_inputs_once_and_petals_every_time(clients, monkeypatch) -> None:
    from petals.client import remote_forward_backward

    sent = list[int]()  # filled by several threads
    plain = remote_forward_backward.serialize_torch_tensor

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    monkeypatch.setattr(remote_forward_backward, "serialize_torch_tensor", counted)
    hidden, prompts = inputs(0, deep=True)
    once = hidden.numel() + prompts.numel()
    for name, expected_sent in (
        ("stock", 2 * once + hidden.numel()),
        ("ours", once + hidden.numel()),
    ):
        for _ in range(4):  # a server that has just forgotten a graph is asked in full for a while
            remote_step(clients[name], 0, deep=True, follows=True)
        sent.clear()
        remote_step(clients[name], 0, deep=True, follows=True)
        assert sum(sent) == expected_sent, name


@pytest.mark.swarm
def test_requests_in_flight_do_not_mix(clients) -> None:
    alone = [remote_step(clients["stock"], seed, deep=seed % 2 == 1, follows=True)
             for seed in range(6)]  # fmt: skip
    sequences = [clients["ours"], clients["plain"]] * 3
    with ThreadPoolExecutor(6) as pool:
        together = [
            pool.submit(remote_step, sequence, seed, deep=seed % 2 == 1, follows=seed != 4)
            for seed, sequence in enumerate(sequences)
        ]
        for future, reference in zip(together, alone, strict=True):
            assert all(map(torch.equal, future.result(60), reference))


@pytest.mark.swarm
def test_inference_with_a_cache_gives_the_same_outputs(clients) -> None:
    hidden, _ = inputs(0, deep=False)
    outputs = []
    for name in ("stock", "ours"):
        with torch.inference_mode(), clients[name].inference_session(max_length=9) as session:
            parts = [session.step(hidden[:, :5].clone()), session.step(hidden[:, 5:].clone())]
            outputs.append(torch.cat(parts, dim=1))
    assert torch.equal(*outputs)
    forward = remote_step(clients["ours"], 0, deep=False, follows=False)[0]
    torch.testing.assert_close(outputs[1], forward, rtol=1e-5, atol=1e-5)
