"""A server's steps over kept keys and values, and the way of its tasks between processes."""

from __future__ import annotations

# ruff: noqa: I001 (petals can only be imported after petals_compat)
import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tune_app.petals_compat  # noqa: F401
from hivemind import BatchTensorDescriptor
from hivemind.moe.server.runtime import Runtime
from hivemind.utils.asyncio import switch_to_uvloop
from petals.data_structures import InferenceMetadata

from tests.tiny_models import FAMILIES, write_tiny_model
from tune_app.backbones.local import LocalBackbone
from tune_app.models import threads
from tune_app.models.kept import KeptCache, KeptLayer
from tune_app.models.load_parts import load_blocks
from tune_app.models.parts import Block, Span
from tune_app.serve.cached_steps import CachedSteps
from tune_app.serve.direct_pool import DirectPool
from tune_app.serve.server import _Backend, _Config, _load_block

LAYERS, HIDDEN, MOST = 3, 32, 24
AS_THEY_ARE = torch.empty(0, dtype=torch.int64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_one_pass_are_the_blocks_one_by_one(family: str, tmp_path: Path) -> None:
    """Bit for bit, also in another order than in the model, and with deep prompts."""
    folder = write_tiny_model(family, tmp_path / family)
    blocks = [Block(load_blocks(folder, [index], torch.float32), index) for index in range(2)]
    size = LocalBackbone(folder, device="cpu", dtype="float32").hidden_size
    deep = [random(1, 2, size, seed=5), None]
    for chosen in (blocks, blocks[::-1]):
        together = KeptCache([KeptLayer(MOST), KeptLayer(MOST)], [b.index for b in chosen])
        alone = [KeptCache([KeptLayer(MOST)], [block.index]) for block in chosen]
        for number, positions in enumerate((9, 1, 3)):
            into = random(1, positions, size, seed=number)
            given = deep if number == 0 else [None, None]
            with torch.no_grad():
                output = Span(chosen)(into, given, together)
                for block, cache, prompt in zip(chosen, alone, given, strict=True):
                    if prompt is not None:
                        into = torch.cat([into[:, :2] + prompt, into[:, 2:]], dim=1)
                    into = block(into, cache)
            assert torch.equal(output, into)


# ---------------------------------------------------------------------------- a server's backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)


class Memory:
    """Tensors by their handles. In Petals' own, other processes must ask for them."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    @contextmanager
    def use_cache(self, *handles: int) -> Iterator[tuple[torch.Tensor, ...]]:
        yield tuple(self.tensors[handle] for handle in handles)


def backends(folder: Path, attention_bytes: int = 2**28) -> dict[str, Any]:
    """As Petals' server makes them."""
    config, memory = _Config.from_pretrained(str(folder)), Memory()
    states = BatchTensorDescriptor(1, 2048, HIDDEN, dtype=torch.float32)
    made = {}
    for index in range(LAYERS):
        uid = f"tiny.{index}"
        made[uid] = _Backend(
            uid,
            _load_block(str(folder), index, config=config, torch_dtype=torch.float32),
            config=config,
            memory_cache=memory,
            backend_dtype=torch.float32,
            max_chunk_size_bytes=attention_bytes,
            args_schema=(states,),
            kwargs_schema={},
            outputs_schema=(states,),
            min_batch_size=1,
            max_batch_size=1024,
        )
    return made


def steps(
    served: dict[str, Any],
    pieces: Sequence[torch.Tensor],
    deep: torch.Tensor | None = None,
    order: torch.Tensor = AS_THEY_ARE,
) -> torch.Tensor:
    """The output for all pieces of the texts. order: of the rows, from the second piece on"""
    compute, memory = CachedSteps(served), next(iter(served.values())).memory_cache
    descriptors = [b.get_inference_cache_descriptors(len(pieces[0]), MOST) for b in served.values()]
    memory.tensors = [one.make_zeros() for both in descriptors for one in both]
    outputs: list[torch.Tensor] = []
    at = 0
    for piece in pieces:
        infos = tuple(
            InferenceMetadata(uid, at, (2 * i, 2 * i + 1), "") for i, uid in enumerate(served)
        )
        prompts = [None] * LAYERS if at or deep is None else deep
        outputs += compute(piece, order if at else AS_THEY_ARE, infos, *prompts)
        at += piece.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("attention_bytes", [2**28, 4 * 4 * 2 * 9 * 4], ids=["whole", "in parts"])
def test_steps_over_a_cache_are_the_whole_pass(folder: Path, attention_bytes: int) -> None:
    """Of transformers' own layers; where memory for attention is short, in parts of a few."""
    served = backends(folder, attention_bytes)
    texts, deep = random(2, 14, HIDDEN), random(LAYERS, 1, 5, HIDDEN, seed=1)
    pieces = list(texts.split([9, 1, 1, 3], dim=1))
    model = AutoModelForCausalLM.from_pretrained(folder).model
    states, rotary = texts, model.rotary_emb(texts, torch.arange(14)[None])
    causal = torch.full((14, 14), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            states = torch.cat([states[:, :5] + deep[index], states[:, 5:]], dim=1)
            states = layer(states, attention_mask=causal, position_embeddings=rotary)
    torch.testing.assert_close(steps(served, pieces, deep), states, rtol=1e-5, atol=1e-5)


def test_rows_change_their_order_with_their_keys(folder: Path) -> None:
    """As in a beam search of Petals' client."""
    served, texts, more = backends(folder), random(2, 4, HIDDEN), random(2, 1, HIDDEN, seed=2)
    swapped = steps(served, [texts, more], order=torch.tensor([1, 0]))[:, -1:]
    torch.testing.assert_close(swapped, steps(served, [texts[[1, 0]], more])[:, -1:])
    assert not torch.allclose(swapped, steps(served, [texts, more])[:, -1:])


@pytest.mark.parametrize(("most", "expected"), [(2_000_000, 1), (0, 3)])
def test_a_small_step_takes_one_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    """In process and on a server; a larger one takes all, and all are there again afterwards."""
    monkeypatch.setattr(threads, "_LEAST_PRODUCTS", most)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        served, here = backends(folder), LocalBackbone(folder, device="cpu", dtype="float32")
        blocks = [backend.module.block.slot.block for backend in served.values()]
        for block in [*blocks, *here._model.model.layers]:
            block.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        here.session(None, 4).extend(random(1, 2, HIDDEN))
        steps(served, [random(1, 2, HIDDEN)])
        assert seen == [expected] * 2 * LAYERS
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------ tasks between processes


class Unknown(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def computed(tensor: torch.Tensor, what: Any) -> tuple[torch.Tensor, ...]:
    if what == "value":
        raise ValueError("no such block")
    if what == "unknown":
        raise Unknown("no", "block")
    return 2 * tensor, torch.empty(0), tensor[..., :1].to(torch.bfloat16)


@pytest.fixture
def pool() -> Iterator[DirectPool]:
    pool = DirectPool(computed, max_batch_size=2**20, name="test", device=torch.device("cpu"))
    runtime = Runtime({"one": SimpleNamespace(get_pools=lambda: [pool])})
    runtime.daemon = True
    runtime.start()
    yield pool
    runtime.shutdown()
    runtime.join()


# Messages that go through the pipe in one piece, in several, and through shared memory.
POSITIONS = (1, 3, *[320] * 40, 5000)


def handle(pool: DirectPool, results: Any) -> None:
    """A handler's process."""
    torch.set_num_threads(1)  # as Petals does there: a fork has no threads to wait for

    async def run() -> None:
        tensors = [random(2, n, 8, seed=n) for n in POSITIONS]
        futures = [pool.submit_task(tensor, None) for tensor in tensors]
        futures += [pool.submit_task(tensors[0], what) for what in ("value", "unknown")]
        futures.append(pool.submit_task(torch.empty(2**11, 2**11, 1), None))
        answers = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)
        results.put([a if isinstance(a, Exception) else [t.tolist() for t in a] for a in answers])

    switch_to_uvloop().run_until_complete(run())  # as hivemind does there


@pytest.mark.parametrize("handlers", [1, 2])
def test_handlers_get_their_own_answers_and_errors(pool: DirectPool, handlers: int) -> None:
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=handle, args=(pool, results)) for _ in range(handlers)]
    for process in processes:
        process.start()
    for _ in processes:
        *answers, value, unknown, too_large = results.get(timeout=30)
        for n, answer in zip(POSITIONS, answers, strict=True):
            tensor = random(2, n, 8, seed=n)
            assert answer == [t.tolist() for t in computed(tensor, None)]
        assert isinstance(value, ValueError)
        assert str(value) == "no such block"
        assert isinstance(unknown, RuntimeError)
        assert "Unknown('no block')" in str(unknown)
        assert "more than 1048576 tokens" in str(too_large)
    for process in processes:
        process.join()
