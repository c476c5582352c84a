"""Packs: what is planned into them, and that a trial gets out what it would have got alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import write_tiny_model
from tests.trials import MIXED, VOCAB, Spec, float64_throughout, make_trial, same_bits, tensors
from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.backbones.packing import Answer, Part, Request, assemble, plan, run_pack, run_parts
from tune_app.backbones.protocol import BackboneUnavailable, PackLimits

no_deadline = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "llama-gqa", "bloom", "falcon")
    return {name: write_tiny_model(name, root / name, vocab=VOCAB) for name in families}


@pytest.fixture(scope="module")
def backbone(folders):
    return LocalBackbone(folders["llama"], device="cpu", dtype="float32")


# ------------------------------------------------------------------------------------------ plan

SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), max_size=12)
LIMITS = st.builds(
    PackLimits,
    tokens_per_pack=st.integers(1, 200),
    packs_in_flight=st.just(1),
    pairs_per_pack=st.none() | st.integers(1, 4000),
)


def of_tokens(tokens_per_pack: int) -> PackLimits:
    return PackLimits(tokens_per_pack, packs_in_flight=1)


@given(SIZES, LIMITS)
def test_plan_places_every_row_exactly_once(sizes, limits):
    placed = sorted(
        (part.request, row)
        for parts in plan(sizes, limits)
        for part in parts
        for row in range(part.rows.start, part.rows.stop)
    )
    assert placed == [(i, row) for i, (rows, _) in enumerate(sizes) for row in range(rows)]


@given(SIZES, LIMITS)
def test_plan_exceeds_no_limit_but_by_a_single_longer_row(sizes, limits):
    for rows, width in _shapes(sizes, limits):
        if rows > 1:
            assert rows * width <= limits.tokens_per_pack
            assert limits.pairs_per_pack is None or rows * width**2 <= limits.pairs_per_pack


@given(SIZES, LIMITS)
def test_plan_opens_no_needless_pack(sizes, limits):
    """Packs are filled up: the first row of the next one would not have fitted."""
    for (rows, width), _ in pairwise(_shapes(sizes, limits)):
        assert rows + 1 > limits.rows(width)


@given(SIZES, LIMITS)
def test_plan_pads_no_row_to_one_of_an_earlier_pack(sizes, limits):
    widths = [width for _, width in _shapes(sizes, limits)]
    assert widths == sorted(widths, reverse=True)


def _shapes(sizes, limits) -> list[tuple[int, int]]:
    """(rows, padded width) of each planned pack."""
    return [
        (sum(map(len, parts)), max(sizes[part.request][1] for part in parts))
        for parts in plan(sizes, limits)
    ]


@pytest.mark.parametrize(
    ("row_tokens", "rows"), [(8, 12), (10, 10), (20, 2), (31, 1), (32, 0), (101, 0)]
)
def test_limits_count_tokens_and_what_attention_matrices_hold(row_tokens, rows):
    limits = PackLimits(tokens_per_pack=100, packs_in_flight=1, pairs_per_pack=1000)
    assert limits.rows(row_tokens) == rows


# -------------------------------------------------------------------------------------- assemble

HIDDEN, BLOCKS = 4, 2


@st.composite
def requests_of_any_shape(draw):
    """Requests with numbers that say where they belong, none of them 0."""
    requests = []
    for number in range(draw(st.integers(1, 5))):
        rows, text, prompt = (draw(st.integers(low, 5)) for low in (1, 1, 1))
        value = 1.0 + 100 * number
        embeds = torch.arange(rows * text * HIDDEN).view(rows, text, HIDDEN) % 97 / 100 + value
        deep = torch.full((BLOCKS, prompt, HIDDEN), value) if draw(st.booleans()) else None
        prompts = torch.full((prompt, HIDDEN), -value)
        requests.append(Request(embeds, prompts, deep, head=lambda hidden, rows: (hidden, {})))
    return requests


@given(requests_of_any_shape(), st.integers(1, 60))
def test_assembled_rows_are_prompt_text_and_zeros(requests, limit):
    for parts in plan([(r.rows, r.row_tokens) for r in requests], of_tokens(limit)):
        embeds_BSH, deep_LBPH = assemble(requests, parts)
        rows = [
            (requests[p.request], row) for p in parts for row in range(p.rows.start, p.rows.stop)
        ]
        assert len(embeds_BSH) == len(rows)
        assert embeds_BSH.shape[1] == max(request.row_tokens for request, _ in rows)
        assert (deep_LBPH is None) == all(request.deep_LPH is None for request, _ in rows)
        for i, (request, row) in enumerate(rows):
            expected = torch.cat([request.prompt_PH, request.embeds_BTH[row]])
            assert torch.equal(embeds_BSH[i, : len(expected)], expected)
            assert not embeds_BSH[i, len(expected) :].any()
            prompts = 0
            if request.deep_LPH is not None:
                prompts = len(request.prompt_PH)
                assert torch.equal(deep_LBPH[:, i, :prompts], request.deep_LPH)
            if deep_LBPH is not None:
                assert not deep_LBPH[:, i, prompts:].any()


# ------------------------------------------------------------------------------- packed as alone

SPECS = st.lists(
    st.builds(
        Spec,
        task=st.sampled_from(["causal-lm", "classification", "regression"]),
        tuning_mode=st.sampled_from(["ptune", "deep_ptune"]),
        prompt_length=st.integers(1, 6),
        lengths=st.lists(st.integers(2, 14), min_size=1, max_size=5).map(tuple),
        seed=st.integers(0, 9),
    ),
    min_size=1,
    max_size=5,
)


def packed(backbone, requests, tokens_per_pack) -> list[Answer]:
    """The answers of requests that share packs, as the packer puts them together."""
    answers = [Answer() for _ in requests]
    for parts in plan([(r.rows, r.row_tokens) for r in requests], of_tokens(tokens_per_pack)):
        for part, answer in zip(parts, run_pack(backbone, requests, parts), strict=True):
            assert isinstance(answer, Answer), answer
            answers[part.request].add(answer)
    return answers


def assert_close(ours: Answer, theirs: Answer, relative: float):
    """Relative to the largest number of each tensor: what is small may have cancelled."""
    assert ours.loss == pytest.approx(theirs.loss, rel=relative)
    assert ours.sums == theirs.sums
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("tokens_per_pack", [4096, 40], ids=["one pack", "cut"])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "bloom", "falcon"])
def test_float64_gradients_are_those_of_the_trial_alone(folders, family, tokens_per_pack):
    with float64_throughout():
        backbone = LocalBackbone(folders[family], device="cpu", dtype="float64")
        requests = [make_trial(backbone, spec).request() for spec in MIXED]
        answers = packed(backbone, requests, tokens_per_pack)
        for answer, request in zip(answers, requests, strict=True):
            assert answer.prompt_PH.dtype == torch.float64
            assert_close(answer, run_alone(backbone, request), 1e-10)


@no_deadline
@given(specs=SPECS, tokens_per_pack=st.sampled_from([20, 64, 4096]))
def test_float32_gradients_of_any_mixture(backbone, specs, tokens_per_pack):
    requests = [make_trial(backbone, spec).request() for spec in specs]
    for answer, request in zip(packed(backbone, requests, tokens_per_pack), requests, strict=True):
        assert_close(answer, run_alone(backbone, request), 1e-5)


@pytest.mark.parametrize("tokens_per_pack", [4096, 40], ids=["one pack", "cut"])
def test_plain_sgd_goes_the_same_way(backbone, tokens_per_pack):
    """AdamW would hide a gradient that is scaled wrongly, as by averaging over the pack."""
    together = [make_trial(backbone, spec) for spec in MIXED]
    alone = [make_trial(backbone, spec) for spec in MIXED]
    learning_rate = 0.1
    before = [trial.model.prompt_embeddings.detach().clone() for trial in alone]
    for _ in range(4):
        answers = packed(backbone, [trial.request() for trial in together], tokens_per_pack)
        for trial, answer in zip(together, answers, strict=True):
            # the order of named_parameters(): prompt, deep prompts, head
            grads = [answer.prompt_PH]
            if answer.deep_LPH is not None:
                grads.append(answer.deep_LPH.transpose(0, 1).flatten(1))
            grads += answer.head_parameters
            with torch.no_grad():
                for parameter, grad in zip(trial.model.parameters(), grads, strict=True):
                    parameter -= learning_rate * grad
        for trial in alone:
            optimizer = torch.optim.SGD(trial.model.parameters(), lr=learning_rate)
            trial.model(trial.batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs, start in zip(together, alone, before, strict=True):
        assert (theirs.model.prompt_embeddings - start).abs().max() > 1e-3
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_how_many_share_the_pack(backbone):
    """The same trial eight times: each gets what one gets, not an eighth of it."""
    request = make_trial(backbone, MIXED[0]).request()
    (alone,) = packed(backbone, [request], 4096)
    for answer in packed(backbone, [request] * 8, 4096):
        assert_close(answer, alone, 1e-5)


def test_evaluation_gives_the_same_loss_without_gradients(backbone):
    trials = [make_trial(backbone, spec) for spec in MIXED]
    with_grad = packed(backbone, [trial.request() for trial in trials], 4096)
    requests = [trial.request(needs_grad=False) for trial in trials]
    for answer, expected in zip(packed(backbone, requests, 4096), with_grad, strict=True):
        assert answer.loss == expected.loss
        assert answer.sums == expected.sums
        assert (answer.prompt_PH, answer.deep_LPH, answer.head_parameters) == (None, None, [])


# ------------------------------------------------------------------------------------- failures


def all_rows(requests) -> list[Part]:
    return [Part(i, slice(0, request.rows)) for i, request in enumerate(requests)]


def test_a_head_that_raises_fails_only_its_own_request(backbone):
    requests = [make_trial(backbone, spec).request() for spec in MIXED]
    before = run_pack(backbone, requests, all_rows(requests))

    def broken(hidden_BTH, rows):
        raise ArithmeticError("this head is broken")

    requests[1] = replace(requests[1], head=broken)
    after = run_pack(backbone, requests, all_rows(requests))
    assert isinstance(after[1], ArithmeticError)
    for i in (0, 2, 3):
        assert same_bits(before[i], after[i])


class Failing(LocalBackbone):
    """Raises for every pack with a row that begins with a 7, and counts the packs."""

    error: Exception = RuntimeError("out of memory")

    def blocks(self, embeds_BSH, deep_LBPH):
        self.packs = getattr(self, "packs", 0) + 1
        if (embeds_BSH[:, 0] == 7).all(-1).any():
            raise self.error
        return super().blocks(embeds_BSH, deep_LBPH)


@pytest.fixture
def failing(folders):
    return Failing(folders["llama"], device="cpu", dtype="float32")


def one_bad_request(backbone) -> list[Request]:
    requests = [make_trial(backbone, spec).request() for spec in MIXED]
    requests[2] = replace(requests[2], prompt_PH=torch.full_like(requests[2].prompt_PH, 7))
    return requests


def test_where_the_blocks_raise_each_request_is_retried_alone(failing):
    requests = one_bad_request(failing)
    answers = run_parts(failing, requests, all_rows(requests))
    assert failing.packs == 1 + len(requests)
    assert answers[2] is failing.error
    for i in (0, 1, 3):
        assert_close(answers[i], run_alone(failing, requests[i]), 1e-6)


def test_a_request_that_fails_alone_is_not_retried(failing):
    request = one_bad_request(failing)[2]
    assert run_parts(failing, [request], all_rows([request])) == [failing.error]
    assert failing.packs == 1
    with pytest.raises(RuntimeError, match="out of memory"):
        run_alone(failing, request)


def test_an_unavailable_backbone_is_asked_once(failing):
    failing.error = BackboneUnavailable("no server answered")
    requests = one_bad_request(failing)
    assert run_parts(failing, requests, all_rows(requests)) == [failing.error] * len(requests)
    assert failing.packs == 1
