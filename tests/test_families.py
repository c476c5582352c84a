"""Every family against transformers' whole models: in process, on a server, on a chain of two.

The servers are real ones, in processes of their own; each has the blocks of all families.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.served_families import Served, serving
from tests.tiny_models import FAMILIES, write_tiny_model
from tests.trials import MIXED, VOCAB, make_trial, tensors
from tests.whole_models import differences, loss_and_gradients, open_whole
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packing import Part, run_pack

# In bfloat16 too; the pairs differ in what they compute in float32 along the way.
HALF = ("llama-3.2", "qwen3", "gemma3", "bloom")
# Kernels sum in another order for another shape of the batch, and so do chunks of a request.
SAME = 2e-5


def prefix(family: str, kind: str) -> str:
    return f"{kind}-{family}".replace(".", "-")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_tiny_model(name, root / name, vocab=VOCAB) for name in FAMILIES}


@pytest.fixture(scope="module")
def peers(folders):
    """Of two servers, which together have each model whole, in halves and some in bfloat16."""
    named = [(name, str(folder)) for name, folder in folders.items()]
    first = [
        *(Served(folder, prefix(name, "one")) for name, folder in named),
        *(Served(folder, prefix(name, "chain"), 0, 1) for name, folder in named),
        *(Served(str(folders[name]), prefix(name, "half"), dtype="bfloat16") for name in HALF),
    ]
    second = [Served(folder, prefix(name, "chain"), 1, 2) for name, folder in named]
    with serving(first) as peers, serving(second, peers) as more:
        yield [*peers, *more]


@pytest.fixture(scope="module")
def open_swarm(folders, peers):
    """A function (family, kind, dtype) -> SwarmBackbone. All share one node of the network, since
    starting one for each would take longer than everything else."""
    from hivemind import DHT

    from tune_app.backbones import swarm

    dht = DHT(initial_peers=peers, client_mode=True, start=True)
    opened = []

    @cache
    def open_one(family: str, kind: str, dtype: str = "float32"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(swarm, "RemoteSequential", partial(swarm.RemoteSequential, dht=dht))
            backbone = swarm.SwarmBackbone(
                folders[family], peers=peers, dht_prefix=prefix(family, kind), dtype=dtype
            )
        opened.append(backbone)
        return backbone

    yield open_one
    for backbone in opened[1:]:
        backbone._manager.shutdown()
    if opened:
        opened[0].close()
    else:
        dht.shutdown()


@pytest.fixture
def open_backbone(request, folders):
    def open_one(family: str, where: str, dtype: str = "float32"):
        if where == "local":
            return LocalBackbone(folders[family], device="cpu", dtype=dtype)
        kind = where if dtype == "float32" else "half"
        return request.getfixturevalue("open_swarm")(family, kind, dtype)

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


@pytest.mark.parametrize("where", ["local", pytest.param("one", marks=pytest.mark.swarm)])
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
