"""Priors of a space: what is drawn, how often, and what a file may say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.study.prior import ChoicePrior, NumberPrior, PriorSampler, share, with_priors
from tune_app.study.samplers import build_sampler
from tune_app.study.yaml_space import load_space

SPACE = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1, prior: {center: 1.0e-2, spread: 2}}
  weight_decay: {space: choice, categories: [0.0, 0.01, 0.1]}
"""


def draws(prior: NumberPrior | ChoicePrior, distribution, count: int = 2000) -> list:
    return [prior.sample(distribution, np.random.default_rng(i)) for i in range(count)]


def test_a_number_follows_the_normal_distribution_cut_off_at_the_bounds() -> None:
    drawn = draws(NumberPrior(1.0, 2.0), FloatDistribution(0.0, 4.0))
    expected = stats.truncnorm(-0.5, 1.5, loc=1.0, scale=2.0)
    assert stats.kstest(drawn, expected.cdf).pvalue > 0.01


def test_on_a_logarithmic_scale_the_spread_is_a_factor() -> None:
    drawn = draws(NumberPrior(1e-2, 3.0), FloatDistribution(1e-4, 1e-1, log=True))
    low, high = (math.log(bound / 1e-2) / math.log(3) for bound in (1e-4, 1e-1))
    expected = stats.truncnorm(low, high, loc=math.log(1e-2), scale=math.log(3))
    assert stats.kstest(np.log(drawn), expected.cdf).pvalue > 0.01


@pytest.mark.parametrize(
    "distribution",
    [
        IntDistribution(0, 40, step=10),
        IntDistribution(1, 500, log=True),
        FloatDistribution(0.0, 1.0, step=0.25),
        FloatDistribution(1e-4, 1e-1, log=True),
    ],
)
@pytest.mark.parametrize("center", [1e-9, 10.0, 1e9])
def test_whatever_the_prior_a_value_is_one_of_the_parameters_own(distribution, center) -> None:
    for value in draws(NumberPrior(center, 1.5), distribution, 50):
        assert distribution._contains(distribution.to_internal_repr(value))


def test_choices_come_as_often_as_their_weights_say() -> None:
    prior = ChoicePrior({"linear": 3.0, "cosine": 1.0})
    drawn = draws(prior, CategoricalDistribution(["linear", "cosine", "constant"]))
    assert drawn.count("linear") / len(drawn) == pytest.approx(0.75, abs=0.04)
    assert "constant" not in drawn


def sampled(sampler: optuna.samplers.BaseSampler, space, trials: int) -> list[dict]:
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask()
        space(trial)
        study.tell(trial, (math.log10(trial.params["lr"]) + 2) ** 2)
    return [trial.params for trial in study.trials]


@pytest.fixture
def space(tmp_path: Path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return load_space(str(file))


def test_a_third_of_the_first_trials_come_from_the_prior_and_fewer_later(space) -> None:
    seeds, trials = 40, 32
    from_prior = np.zeros(trials)
    for seed in range(seeds):
        sampler = with_priors(optuna.samplers.RandomSampler(seed), space, seed)
        assert isinstance(sampler, PriorSampler)
        study = optuna.create_study(sampler=sampler)
        for number in range(trials):
            study.ask()
            trial = study.get_trials(deepcopy=False)[-1]
            from_prior[number] += sampler.draws_from_prior(study, trial) / seeds
    assert from_prior[:8].mean() == pytest.approx(1 / 3, abs=0.08)
    assert from_prior[24:].mean() == pytest.approx(share(28), abs=0.06)


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "cmaes"])
def test_every_sampler_begins_near_the_prior_and_stays_within_the_space(space, name: str) -> None:
    parameters = sampled(build_sampler(name, space, 3), space, 16)
    values = [params["lr"] for params in parameters]
    assert sum(3e-3 < value < 3e-2 for value in values) >= 4
    assert all(1e-4 <= value <= 1e-1 for value in values)


def test_the_seed_and_the_number_alone_decide_what_the_prior_draws(space) -> None:
    first = sampled(build_sampler("tpe", space, 5), space, 12)
    assert first == sampled(build_sampler("tpe", space, 5), space, 12)
    assert first != sampled(build_sampler("tpe", space, 6), space, 12)


def test_enqueued_trials_do_not_use_up_the_priors_share(space) -> None:
    study = optuna.create_study(sampler=with_priors(optuna.samplers.RandomSampler(0), space, 0))
    for first in space.first_trials(SearchConfig().base_trial()):
        first.enqueue(study)
    trial = study.ask()
    space(trial)
    assert trial.params["lr"] == 1e-3  # the documented default, whatever the prior


def test_without_a_prior_the_sampler_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("parameters:\n  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}\n")
    sampler = optuna.samplers.RandomSampler(0)
    assert with_priors(sampler, load_space(str(file)), 0) is sampler


def test_a_prior_changes_where_a_search_begins_and_not_what_it_may_suggest(tmp_path, space) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(SPACE.replace(", prior: {center: 1.0e-2, spread: 2}", ""))
    assert space.difference(load_space(str(file))) == []
    assert "prior: around 0.01, spread 2" in space.describe()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("lr: {space: loguniform, lower: 1.0e-4, upper: 0.1, prior: 0.01}", "must be {center"),
        (
            "lr: {space: loguniform, lower: 1.0e-4, upper: 0.1, prior: {center: -1, spread: 3}}",
            "center: must be above 0 on a logarithmic scale, got -1.",
        ),
        (
            "lr: {space: loguniform, lower: 1.0e-4, upper: 0.1, prior: {center: 0.01, spread: 1}}",
            "spread: must be a factor above 1 on a logarithmic scale, got 1.",
        ),
        (
            "eps: {space: uniform, lower: 1.0e-8, upper: 0.1, prior: {center: 0.01, spread: 0}}",
            "spread: must be above 0, got 0.",
        ),
        (
            "lr: {space: loguniform, lower: 1.0e-4, upper: 0.1, prior: {center: x, spread: 3}}",
            "center",
        ),
        (
            "scheduler: {space: choice, categories: [linear, cosine], prior: {constant: 1}}",
            "'constant' is never suggested (linear, cosine).",
        ),
        (
            "scheduler: {space: choice, categories: [linear, cosine], prior: {linear: -1}}",
            "linear: must be a weight of 0 or more, got -1.",
        ),
        (
            "scheduler: {space: choice, categories: [linear, cosine], prior: {linear: 0}}",
            "at least one weight must be above 0.",
        ),
        (
            "scheduler: {space: choice, categories: [linear, cosine], prior: linear}",
            "must give a weight to choices of the parameter (linear, cosine)",
        ),
    ],
)
def test_a_wrong_prior_is_refused(tmp_path: Path, parameter: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(f"parameters:\n  {parameter}\n")
    with pytest.raises(ConfigError) as error:
        load_space(str(file))
    assert message in str(error.value)
    assert ".prior: " in str(error.value)
