"""Continued texts: the tokens of transformers' `generate`, kept keys and values or not."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from tests.tiny_models import FAMILIES, write_tiny_model
from tune_app.apply import generation
from tune_app.apply.generation import Sampling, chooser, continuation
from tune_app.apply.logits import next_token_logits
from tune_app.backbones.local import LocalBackbone, LocalSession
from tune_app.backbones.packer import run_alone
from tune_app.backbones.protocol import Backbone
from tune_app.models.load_parts import load_ends
from tune_app.models.parts import Ends
from tune_app.run.trial_config import TrialConfig, TuningMode
from tune_app.serve.serve_config import ServeConfig
from tune_app.serve.supervisor import private_swarm
from tune_app.tasks.known import task_named
from tune_app.train.prompt_model import PromptTunedModel

PROMPT, NEW = 3, 12
TEXT = [5, 60, 7, 80, 9, 100, 11]
MODES: list[TuningMode] = ["ptune", "deep_ptune"]


def prompted(backbone: Backbone, mode: TuningMode = "ptune") -> PromptTunedModel:
    """Prompts that say something."""
    config = TrialConfig(tuning_mode=mode, prompt_length=PROMPT, seed=4)
    return PromptTunedModel(
        backbone, partial(run_alone, backbone), task_named("causal-lm"), 0, config
    )


def local(folder: Path) -> LocalBackbone:
    return LocalBackbone(folder, device="cpu", dtype="float32")


def greedy(model: PromptTunedModel, new: int = NEW) -> list[int]:
    return list(continuation(model, TEXT, new, chooser(None)))


def without_cache(model: PromptTunedModel, sampling: Sampling | None = None) -> list[int]:
    tokens, choose = list(TEXT), chooser(sampling)
    for _ in range(NEW):
        tokens.append(choose(next_token_logits(model, tokens)))
    return tokens[len(TEXT) :]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts passes over whole texts; one is the check of the cache."""
    counts: Counter[str] = Counter()

    def counted(model: PromptTunedModel, tokens: list[int]) -> torch.Tensor:
        counts["whole"] += 1
        return next_token_logits(model, tokens)

    monkeypatch.setattr(generation, "next_token_logits", counted)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    family: str, tmp_path: Path, passes: Counter[str]
) -> None:
    """Of transformers, given the prompts as embeddings in front of the text's."""
    folder = write_tiny_model(family, tmp_path / family)
    model = prompted(local(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    words_BTH = theirs.get_input_embeddings()(torch.tensor([TEXT]))
    expected = theirs.generate(
        inputs_embeds=torch.cat([model.prompt_embeddings.detach()[None], words_BTH], dim=1),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )[0].tolist()
    assert greedy(model) == expected
    assert passes["whole"] == 1
    # Some of these models repeat one token for ever; other texts, and deep prompts, tell more.
    for mode in MODES:
        assert_as_without_a_cache(prompted(model.backbone, mode))


def assert_as_without_a_cache(model: PromptTunedModel) -> None:
    tokens: list[int] = []
    kept = generation._Kept(model, 30)
    for more in (TEXT, [13], [80], [1000], [4, 9], [13], [700], [3]):
        tokens += more
        logits_V = kept.next_logits(more)
        torch.testing.assert_close(logits_V, next_token_logits(model, tokens), rtol=1e-4, atol=1e-4)
    kept.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_a_text_are_those_of_its_pieces(family: str, tmp_path: Path) -> None:
    """Around blocks elsewhere, which get each position once; GPT-2 numbers them before."""
    ends = Ends(load_ends(write_tiny_model(family, tmp_path / family), torch.float32))
    generator = torch.Generator().manual_seed(1)
    embeds_BSH = torch.randn(1, 7, ends.words.weight.shape[1], generator=generator)
    pieces = [
        ends(embeds_BSH[:, :4], torch.sin),
        ends(embeds_BSH[:, 4:6], torch.sin, first=4),
        ends(embeds_BSH[:, 6:], torch.sin, first=6),
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ends(embeds_BSH, torch.sin))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama", layers=4)


def test_sampled_tokens_are_those_without_a_cache(llama: Path) -> None:
    model = prompted(local(llama))
    before = torch.random.get_rng_state()
    found = {}
    for seed in (0, 1):
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=seed)
        found[seed] = list(continuation(model, TEXT, NEW, chooser(sampling)))
        assert found[seed] == without_cache(model, sampling)
    assert found[0] != found[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_drawn_follows_the_probabilities() -> None:
    """Drawn often, by hand: of 0.5, 0.3, 0.15 and 0.05, at top_p 0.75 only the first two."""
    logits_V = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    draws = 4000

    def shares(sampling: Sampling) -> list[float]:
        choose = chooser(sampling)
        counts = Counter(choose(logits_V) for _ in range(draws))
        return [counts[token] / draws for token in range(4)]

    assert shares(Sampling()) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)
    assert shares(Sampling(top_p=0.75)) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    squared = [share**2 / 0.365 for share in (0.05, 0.5, 0.15, 0.3)]
    assert shares(Sampling(temperature=0.5)) == pytest.approx(squared, abs=0.03)
    assert shares(Sampling(temperature=1e-3, top_p=1e-3)) == [0, 1, 0, 0]


class Forgetful(LocalBackbone):
    """Keeps nothing but the last token, as a cache that is wrong for its family would."""

    def session(self, deep_LBPH: torch.Tensor | None, most_positions: int) -> LocalSession:
        class Session(LocalSession):
            def extend(self, embeds_BSH: torch.Tensor) -> torch.Tensor:
                self._cache = DynamicCache(config=self._whole.trunk.config)
                return super().extend(embeds_BSH)

        return Session(self._whole, deep_LBPH, most_positions)


def test_a_wrong_cache_is_found_and_not_used(llama: Path, passes: Counter[str]) -> None:
    model = prompted(Forgetful(llama, device="cpu", dtype="float32"))
    assert greedy(model) == without_cache(prompted(local(llama)))
    assert passes["whole"] == NEW


@pytest.mark.swarm
def test_on_a_swarm_of_two_servers(llama: Path, passes: Counter[str]) -> None:
    from tune_app.backbones.swarm import SwarmBackbone

    here = local(llama)
    with private_swarm(ServeConfig(llama, servers=2, threads=1)) as swarm:
        backbone = SwarmBackbone(
            llama, peers=swarm.peers, dht_prefix=swarm.dht_prefix, dtype="float32"
        )
        for mode in MODES:
            assert greedy(prompted(backbone, mode)) == without_cache(prompted(here, mode))
        assert passes["whole"] == len(MODES)
        # A connection that breaks, as when a server is killed: all is computed again, deep prompts
        # included.
        session, expected = (
            each.session(torch.ones(4, 1, PROMPT, 32), 20) for each in (backbone, here)
        )
        for number, positions in enumerate((5, 1, 1, 1)):
            embeds_BSH = torch.randn(1, positions, 32, generator=torch.Generator().manual_seed(7))
            if number == 2:
                with suppress(ConnectionError):  # the server may be the first to hang up
                    session._servers[1].close()
            torch.testing.assert_close(session.extend(embeds_BSH), expected.extend(embeds_BSH))
        session.close()
        assert_garbage_is_collected_in_any_thread(backbone)
        backbone.close()


def assert_garbage_is_collected_in_any_thread(backbone: Backbone) -> None:
    """Petals' own sessions would wait for the thread that closes them, here for themselves."""
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker

    session = backbone.session(None, 4)
    session.extend(torch.zeros(1, 1, 32))
    lost, session._servers = session._servers, []

    async def collect() -> None:
        lost.clear()

    RemoteExpertWorker.run_coroutine(collect(), return_future=True).result(timeout=20)
