"""One contract for all backbones: the numbers of Hugging Face's whole models.

Two families, an old and a recent one, each served by a real private swarm; test_families.py has all
families. References are those of transformers alone, which sees one unpadded row at a time.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_models import write_tiny_model
from tests.trials import (
    MIXED,
    VOCAB,
    Spec,
    float64_throughout,
    make_trial,
    same_bits,
)
from tests.whole_models import PROMPT, loss_and_gradients
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packing import Part, run_pack
from tune_app.backbones.protocol import BackboneUnavailable
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm

# Rows of different lengths, so that there is padding, and one that fills the batch.
LENGTHS = (9, 4, 6)
TASKS = ("causal-lm", "classification")
MODES = ("ptune", "deep_ptune")


@pytest.fixture(scope="module", params=["llama-gqa", "bloom"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_tiny_model(family, tmp_path_factory.mktemp("models") / family, vocab=VOCAB)


@pytest.fixture(scope="module")
def local(folder):
    return LocalBackbone(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def served(folder):
    with private_swarm(ServeConfig(folder, threads=1)) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def swarm(folder, served):
    from tune_app.backbones.swarm import SwarmBackbone

    backbone = SwarmBackbone(
        folder, peers=served.peers, dht_prefix=served.dht_prefix, dtype="float32"
    )
    yield backbone
    backbone.close()


@pytest.fixture(scope="module")
def gpu(folder):
    return LocalBackbone(folder, device="cuda", dtype="float32")


HERE = ("local", "gpu") if torch.cuda.is_available() else ("local",)


@pytest.fixture(params=[*HERE, pytest.param("swarm", marks=pytest.mark.swarm)])
def backbone(request, folder):
    return request.getfixturevalue(request.param)


def assert_same(trial, loss, prompt, deep, score):
    """Loss and gradients of our trial (backward done) against a reference's."""
    relative = 1e-10 if trial.loss.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(trial.loss.cpu(), loss, rtol=relative, atol=0)
    model = trial.model
    for ours, theirs in (
        (model.prompt_embeddings, prompt),
        (model.intermediate_prompt_embeddings, deep),
        (model.score, score),
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            grad = ours.grad.cpu()
            assert grad.abs().max() > 1e-4  # or the comparison would say nothing
            # of the largest number: a small one may be what is left of large ones
            assert (grad - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def trial(backbone, task, mode):
    """A trial on the backbone whose loss and gradients are there."""
    trial = make_trial(backbone, Spec(task, mode, PROMPT, LENGTHS, seed=5))
    trial.loss = trial.model(trial.batch)
    trial.loss.backward()
    trial.loss = trial.loss.detach()
    return trial


def test_same_loss_and_gradients_as_hugging_face(trial, task, folder):
    assert_same(trial, *loss_and_gradients(trial, task, folder))


def test_float64_gradients_are_those_of_hugging_face(folder, task, mode):
    with float64_throughout():
        backbone = LocalBackbone(folder, device="cpu", dtype="float64")
        trial = make_trial(backbone, Spec(task, mode, PROMPT, LENGTHS, seed=5))
        trial.loss = trial.model(trial.batch)
        trial.loss.backward()
        trial.loss = trial.loss.detach()
        assert_same(trial, *loss_and_gradients(trial, task, folder))


def test_evaluation_is_the_loss_that_trains(trial, task):
    evaluation = trial.model.evaluate([trial.batch])
    assert evaluation.loss == pytest.approx(trial.loss.item(), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1000.0], ids=["nan", "inf", "x1000"])
def test_what_one_trial_does_leaves_the_others_of_its_pack_alone(backbone, value):
    """At the same shape of the pack every bit of the others stays as it was."""
    requests = [make_trial(backbone, spec).request() for spec in MIXED]
    parts = [Part(i, slice(0, request.rows)) for i, request in enumerate(requests)]
    before = run_pack(backbone, requests, parts)
    for victim, request in enumerate(requests):
        deep = request.deep_LPH
        requests_now = list(requests)
        requests_now[victim] = replace(
            request,
            embeds_BTH=request.embeds_BTH * value,
            prompt_PH=request.prompt_PH * value,
            deep_LPH=None if deep is None else deep * value,
        )
        after = run_pack(backbone, requests_now, parts)
        for i, (was, now) in enumerate(zip(before, after, strict=True)):
            assert same_bits(was, now) == (i != victim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row_tokens", [8, 200])
def test_local_limits_bound_what_is_kept_for_the_backward_pass(
    folder, dtype, row_tokens, monkeypatch
):
    """Counted by autograd's own hooks; with so much memory that both limits matter."""
    monkeypatch.setattr(LocalBackbone, "_free_bytes", lambda self: 2 * 8_000_000)
    backbone = LocalBackbone(folder, device="cpu", dtype=dtype)
    rows = backbone.limits.rows(row_tokens)
    assert rows > 1
    model = backbone._model
    frozen = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds_BSH = torch.randn(rows, row_tokens, backbone.hidden_size, dtype=backbone.dtype)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        backbone.blocks(embeds_BSH.requires_grad_(), None)
    assert sum(kept.values()) <= 8_000_000


def test_hosts_of_one_machine_share_its_memory(folder, monkeypatch):
    memory = SimpleNamespace(available=2 * 8_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    tokens = [
        LocalBackbone(
            folder, device="cpu", dtype="float32", memory_share=share
        ).limits.tokens_per_pack
        for share in (1.0, 0.5)
    ]
    assert 0 < tokens[1] == tokens[0] // 2


def test_packs_respect_the_limits_that_the_backbone_names(backbone):
    """A pack as large as the limit allows goes through."""
    limits = backbone.limits
    assert limits.packs_in_flight >= 1
    embeds_BSH = torch.zeros(limits.rows(32), 32, backbone.hidden_size, device=backbone.device)
    with torch.no_grad():
        assert backbone.blocks(embeds_BSH, None).shape == embeds_BSH.shape


def test_nothing_of_the_backbone_trains(backbone):
    assert not any(parameter.requires_grad for parameter in backbone._model.parameters())


@pytest.mark.swarm
def test_petals_requests_are_counted(swarm):
    before = swarm.traffic.requests
    trial = make_trial(swarm, MIXED[0])
    trial.model(trial.batch).backward()
    assert swarm.traffic.requests == before + 2  # one forward, one backward
    assert swarm.traffic.retries == 0


@pytest.mark.swarm
def test_each_trial_of_a_pack_counts_the_requests_of_that_pack(swarm):
    requests = [make_trial(swarm, spec).request() for spec in MIXED[:2]]
    parts = [Part(i, slice(0, request.rows)) for i, request in enumerate(requests)]
    before = swarm.traffic.requests
    answers = run_pack(swarm, requests, parts)
    assert swarm.traffic.requests == before + 2  # one forward, one backward
    for answer in answers:
        assert (answer.packs.packs, answer.packs.requests, answer.packs.retries) == (1, 2, 0)


@pytest.mark.swarm
def test_an_unreachable_swarm_says_so(tmp_path):
    from tune_app.backbones.swarm import SwarmBackbone

    model = write_tiny_model("llama", tmp_path / "model", vocab=VOCAB)
    peer = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    with pytest.raises(BackboneUnavailable, match="no peer answers at /ip4/"):
        SwarmBackbone(model, peers=[peer], dht_prefix=None, dtype="float32")
