"""Every family against transformers' whole models: in process, on a server, on a chain of two.

The servers are real ones, in processes of their own; each has the blocks of all families.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from tests.pages import ROOT
from tests.served_families import all_served, clients
from tests.tiny_models import FAMILIES, write_tiny_model
from tests.trials import MIXED, VOCAB, make_trial, tensors
from tests.whole_models import (
    differences,
    generation_difference,
    loss_and_gradients,
    open_whole,
)
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packing import Part, run_pack
from tune_app.models import families
from tune_app.models.families import TRIED
from tune_app.models.parts import Block
from tune_app.run.search_config import ConfigError

# In bfloat16 too; the pairs differ in what they compute in float32 along the way.
HALF = ("llama-3.2", "qwen3", "gemma3", "bloom")
# Kernels sum in another order for another shape of the batch, and so do chunks of a request.
SAME = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_tiny_model(name, root / name, vocab=VOCAB) for name in FAMILIES}


@pytest.fixture(scope="module")
def open_client(folders):
    with all_served(folders) as peers, clients(folders, peers) as open_one:
        yield open_one


@pytest.fixture
def open_backbone(request, folders):
    """A function (family, where, dtype): in process, or one of the ways that it is served."""

    def open_one(family: str, where: str, dtype: str = "float32"):
        if where == "local":
            return LocalBackbone(folders[family], device="cpu", dtype=dtype)
        return request.getfixturevalue("open_client")(family, where)

    return open_one


EVERYWHERE = (
    "local",
    pytest.param("one", marks=pytest.mark.swarm),
    pytest.param("chain", marks=pytest.mark.swarm),
)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_logits_and_gradients_are_those_of_the_whole_model(
    family, where, folders, open_backbone
):
    found = differences(folders[family], open_backbone(family, where))
    assert found.largest <= SAME, found


@pytest.mark.parametrize("where", ["local", pytest.param("half", marks=pytest.mark.swarm)])
@pytest.mark.parametrize("family", HALF)
def test_in_bfloat16_too(family, where, folders, open_backbone):
    found = differences(folders[family], open_backbone(family, where, "bfloat16"))
    assert found.largest <= 0.01, found


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_trials_are_trained_as_by_the_whole_model(family, where, folders, open_backbone):
    """Prompts, deep prompts and score heads of four trials whose rows share padded packs."""
    backbone = open_backbone(family, where)
    trials = [make_trial(backbone, spec) for spec in MIXED]
    requests = [trial.request() for trial in trials]
    parts = [Part(i, slice(0, request.rows)) for i, request in enumerate(requests)]
    for spec, answer, expected in zip(
        MIXED, run_pack(backbone, requests, parts), references(folders[family]), strict=True
    ):
        loss, *grads = expected
        assert answer.loss == pytest.approx(loss.item(), rel=SAME)
        ours = tensors(answer)
        if answer.deep_LPH is not None:
            ours[1] = ours[1].transpose(0, 1).flatten(1)
        for grad, theirs in zip(ours, [g for g in grads if g is not None], strict=True):
            assert theirs.abs().max() > 1e-5, spec  # or the comparison would say nothing
            assert (grad - theirs).abs().max() <= SAME * theirs.abs().max(), spec


@cache
def references(folder: Path) -> list[tuple[torch.Tensor, ...]]:
    backbone = LocalBackbone(folder, device="cpu", dtype="float32")  # for the trials' parameters
    return [loss_and_gradients(make_trial(backbone, spec), spec.task, folder) for spec in MIXED]


def test_both_layouts_of_llama_31s_config_stretch_its_positions(folders):
    """Old versions of transformers ignored `rope_parameters`, without a word."""
    tokens_BT = torch.arange(3, 63)[None]

    def logits(family: str) -> torch.Tensor:
        backbone = LocalBackbone(folders[family], device="cpu", dtype="float32")
        with torch.no_grad():
            return backbone.logits(backbone.blocks(backbone.embed(tokens_BT), None))

    assert torch.equal(logits("llama-3.1"), logits("llama-3.1-hub"))
    # The same seed gives the same weights.
    assert (logits("llama-3.1") - logits("llama-gqa")).abs().max() > 0.01
    whole = open_whole(folders["llama-3.1-hub"], torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits("llama-3.1"), whole(tokens_BT).logits)


def test_the_families_taken_as_tried_are_those_of_the_table(folders):
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders.values()]
    assert {config["model_type"] for config in configs} == TRIED
    table = (ROOT / "docs" / "families.md").read_text()
    assert [family for family in FAMILIES if f"| {family} |" not in table] == []
    assert f"transformers {transformers.__version__}" in table


def test_models_whose_blocks_are_elsewhere_are_refused_with_the_reason(tmp_path):
    folder = write_tiny_model("opt", tmp_path / "opt", vocab=VOCAB)
    with pytest.raises(ConfigError, match=r"'opt' are not supported: their blocks are not a list"):
        LocalBackbone(folder, device="cpu", dtype="float32")


@pytest.fixture
def untried(tmp_path, monkeypatch) -> Path:
    """A model of a type that is not in the table, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(families, "TRIED", TRIED - {"qwen3"})
    return write_tiny_model("qwen3", tmp_path / "untried", vocab=VOCAB)


def test_an_untried_family_is_compared_once(untried, monkeypatch):
    compared = []
    differences = families.differences
    monkeypatch.setattr(
        families, "differences", lambda folder: compared.append(folder) or differences(folder)
    )
    families.check_family(untried)
    families.check_family(untried)
    assert len(compared) == 1
    monkeypatch.setattr(families, "_WHOLE_BYTES", 0)
    assert max(differences(untried).values()) < 1e-5  # of the first block


def test_a_family_with_wrong_gradients_is_refused(untried, monkeypatch):
    """Right outputs do not save it."""

    def forward(block, hidden_BSH, cache=None):
        with torch.no_grad():
            out = right(block, hidden_BSH, cache)
        return out + 2 * (hidden_BSH - hidden_BSH.detach())

    right = Block.forward
    monkeypatch.setattr(Block, "forward", forward)
    with pytest.raises(ConfigError) as caught:
        families.check_family(untried)
    (message,) = caught.value.messages
    assert "models of type 'qwen3' are not supported" in message
    assert "gradients of deep prompts on a server by" in message
    assert "logits" not in message
    assert "in process" not in message


@pytest.mark.parametrize("where", ["local", pytest.param("chain", marks=pytest.mark.swarm)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_grows_over_a_cache_is_the_whole_text(family, where, folders, open_backbone):
    """Token by token, with deep prompts; GPT-2's learned positions and sliding windows included."""
    assert generation_difference(folders[family], open_backbone(family, where)) < SAME
