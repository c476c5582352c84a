"""The sampler `gp`: its arithmetic against Optuna's own, and what it makes of a search's trials."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from scipy import stats

from tune_app.run.search_config import SearchConfig
from tune_app.study import surrogate
from tune_app.study.gaussian_process import Encoding, capped, expected_ends
from tune_app.study.samplers import build_sampler
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space

SPACE = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler: {space: choice, categories: [linear, cosine, constant]}
  warmup_steps: {space: randint, lower: 0, upper: 40}
"""
NESTED = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler: {space: choice, categories: [linear, polynomial]}
  power: {space: choice, categories: [1.0, 2.0], when: {scheduler: polynomial}}
  lr_end: {space: loguniform, lower: 1.0e-7, upper: 1.0e-5, when: {power: 2.0}}
"""
PYTHON = """
def space(trial):
    if trial.suggest_categorical("scheduler", ["linear", "polynomial"]) == "polynomial":
        trial.suggest_float("power", 0.5, 3.0)
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return {"eps": lr * 1e-6}
"""
BASE = SearchConfig(steps=40).base_trial()


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def space_of(tmp_path: Path, text: str, name: str = "space.yaml") -> SearchSpace:
    (tmp_path / name).write_text(text)
    return load_space(str(tmp_path / name))


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


def study_of(space: SearchSpace, seed: int = 0, name: str = "gp") -> optuna.Study:
    return optuna.create_study(sampler=build_sampler(name, space, seed))


def asked(study: optuna.Study, space: SearchSpace) -> optuna.Trial:
    trial = study.ask()
    space(trial)
    return trial


def loss(params: dict[str, Any]) -> float:
    """Lowest at lr 1e-2 with a cosine and little warmup."""
    schedule = {"cosine": 0.0, "linear": 0.3}.get(params["scheduler"], 0.6)
    return abs(math.log10(params["lr"]) + 2) + schedule + params.get("warmup_steps", 0) / 100


def searched(study: optuna.Study, space: SearchSpace, trials: int) -> list[dict[str, Any]]:
    for _ in range(trials):
        trial = asked(study, space)
        study.tell(trial, loss(trial.params))
    return [trial.params for trial in study.trials]


# The arithmetic


def test_improvement_is_that_of_optunas_gaussian_process_averaged_over_the_kernels(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna counts choices by whether they are equal, and appends running trials itself."""
    import torch
    from optuna._gp.gp import GPRegressor

    rng = np.random.default_rng(0)
    points = [space.drawn(lambda _, d: rand(d, rng)) for _ in range(17)]
    losses = rng.normal(size=8)
    losses = (losses - losses.mean()) / losses.std()
    lengthscales_KP, noise_K = rng.uniform(0.2, 2, (3, 3)), np.array([0.3, 0.4, 0.5])
    monkeypatch.setattr(surrogate, "kernel_draws", lambda _: (lengthscales_KP, noise_K))

    encoding, scheduler = Encoding(space), ["linear", "cosine", "constant"]
    rows = encoding.encode(points)
    ours = surrogate.expected_improvement(
        rows[:8], 3 + 2 * losses, rows[8:10], rows[10:], encoding.parameter_of_column
    )

    def tensor(values: Any) -> Any:
        return torch.tensor(np.asarray(values), dtype=torch.float64)

    numbers = tensor(
        [
            [(math.log10(p["lr"]) + 4) / 3, scheduler.index(p["scheduler"]), p["warmup_steps"] / 39]
            for p in points
        ]
    )
    expected, likelihoods = [], []
    for lengthscales, noise in zip(lengthscales_KP, noise_K, strict=True):
        theirs = GPRegressor(
            torch.tensor([False, True, False]),
            numbers[:8],
            tensor(losses),
            tensor(lengthscales**-2),
            tensor(1.0),
            tensor(noise),
        )
        likelihoods.append(theirs.marginal_log_likelihood().item())
        theirs._cache_matrix()
        believed, _ = theirs.posterior(numbers[8:10])
        theirs.append_running_data(numbers[8:10], believed)
        mean, variance = theirs.posterior(numbers[10:])
        lowest = min(losses.min(), believed.min().item()) - 0.2  # the margin
        expected.append(
            [
                stats.norm(m, math.sqrt(v)).expect(lambda x, b=lowest: b - x, ub=lowest)
                for m, v in zip(mean.tolist(), variance.tolist(), strict=True)
            ]
        )
    weights = np.exp(likelihoods) / np.exp(likelihoods).sum()
    assert ours == pytest.approx(weights @ np.array(expected), rel=1e-4)
    assert weights.min() > 0.05  # all three count


def rand(distribution: Any, rng: np.random.Generator) -> Any:
    from tune_app.study.prior import value_at

    return value_at(rng.random(), distribution)


def test_the_kernels_are_draws_from_the_published_prior() -> None:
    lengthscales_KP, noise_K = surrogate.kernel_draws(9)
    for column in lengthscales_KP.T:  # evenly spread, better than by chance
        assert stats.kstest(column, stats.uniform(0, 2).cdf).pvalue > 0.99
    assert stats.kstest(np.log(noise_K), stats.norm(-4, 1).cdf).pvalue > 0.99
    assert abs(np.corrcoef(lengthscales_KP.T) - np.eye(9)).max() < 0.35


def test_points_are_apart_as_the_documentation_says(tmp_path: Path) -> None:
    encoding = Encoding(space_of(tmp_path, NESTED))
    linear, cubic, low, high, unknown = encoding.encode(
        [
            {"lr": 1e-4, "scheduler": "linear"},
            {"lr": 1e-1, "scheduler": "polynomial", "power": 1.0},
            {"lr": 1e-1, "scheduler": "polynomial", "power": 2.0, "lr_end": 1e-7},
            {"lr": 1e-1, "scheduler": "polynomial", "power": 2.0, "lr_end": 1e-5},
            {"lr": 9.0, "scheduler": "cosine", "power": 7.0, "lr_end": None},
        ]
    )

    def squares(one: np.ndarray, other: np.ndarray) -> list[float]:
        apart = np.bincount(encoding.parameter_of_column, (one - other) ** 2)
        return apart.round(9).tolist()

    assert squares(linear, cubic) == [1.0, 1.0, 1.0, 0.0]
    assert squares(cubic, low) == [0.0, 0.0, 1.0, 1.25]  # the middle of the range, and not there
    assert squares(low, high) == [0.0, 0.0, 0.0, 1.0]
    assert squares(cubic, unknown) == [0.0, 1.0, 1.0, 0.0]  # kept within bounds


# What it makes of trials


def test_a_stopped_trial_counts_with_where_it_was_heading() -> None:
    def trial(values: list[float], state: TrialState) -> optuna.trial.FrozenTrial:
        reported = dict(enumerate(values, 1))
        return create_trial(state=state, value=values[-1], intermediate_values=reported)

    finished = [trial([3, 2, 2 - gain], TrialState.COMPLETE) for gain in (0.25, 0.5, 4)]
    stopped = trial([5, 4], TrialState.PRUNED)
    assert expected_ends([stopped, *finished]).tolist() == [3.5, 1.75, 1.5, -2.0]
    assert expected_ends([stopped]).tolist() == [4.0]


def test_losses_far_above_the_others_are_lowered() -> None:
    assert capped(np.array([1.0, 1.5, 1.25, np.inf, 1.75])).tolist() == [1.0, 1.5, 1.25, 2.0, 1.75]
    assert capped(np.array([np.inf, np.inf, 1.0, 2.0, np.inf])).tolist() == [3.0, 3.0, 1, 2, 3.0]
    assert capped(np.array([np.inf])).tolist() == [0.0]
    assert capped(np.array([4.0])).tolist() == [4.0]


@pytest.mark.parametrize("huge", [1e30, math.inf])
def test_a_divergence_hides_nothing_of_the_others(space: SearchSpace, huge: float) -> None:
    study = study_of(space)
    for _ in range(16):
        trial = asked(study, space)
        diverged = trial.params["lr"] > 3e-2
        study.tell(trial, huge if diverged else loss(trial.params))
    rates = [trial.params["lr"] for trial in study.trials]
    assert max(rates[:6]) > 3e-2
    assert sum(3e-3 < lr < 3e-2 for lr in rates[8:]) >= 6


def test_the_first_trials_take_each_quarter_of_every_parameter_once(tmp_path: Path) -> None:
    prior = ", prior: {center: 1.0e-2, spread: 2}"
    wide = space_of(tmp_path, SPACE.replace("upper: 1.0e-1", "upper: 1.0e+1" + prior))
    of_prior = 1e-2 * 2 ** stats.norm.ppf([0.25, 0.5, 0.75])
    low, high = (float(bound) for bound in (wide.distributions()["lr"].low, 1e1))
    of_range = low * (high / low) ** np.array([0.25, 0.5, 0.75])  # so many have begun, none ended
    orders = set()
    for seed in range(12):
        study = study_of(wide, seed)
        for first in wide.first_trials(BASE):  # those that are enqueued do not count
            first.enqueue(study)
        params = [asked(study, wide).params for _ in range(10)][2:]
        for four, bounds in ((params[:4], of_prior), (params[4:], of_range)):
            places = [int(np.searchsorted(bounds, p["lr"])) for p in four]
            assert sorted(places) == [0, 1, 2, 3]
            assert sorted(p["warmup_steps"] // 10 for p in four) == [0, 1, 2, 3]
            assert {"linear", "constant"} <= {p["scheduler"] for p in four}
            orders.add(tuple(places))
    assert len(orders) > 6


@pytest.mark.parametrize(("best", "misled"), [(1.1, True), (0.9, False)])
def test_if_the_prior_finds_nothing_better_than_the_default_the_whole_space_is_tried(
    tmp_path: Path, best: float, misled: bool
) -> None:
    wrong = SPACE.replace("upper: 1.0e-1", "upper: 1.0e-1, prior: {center: 1.0e-4, spread: 2}")
    wide, each_quarter = space_of(tmp_path, wrong), 0
    lr = wide.distributions()["lr"]
    of_range = lr.low * (lr.high / lr.low) ** np.array([0.25, 0.5, 0.75])
    for seed in range(8):
        study = study_of(wide, seed)
        wide.first_trials(BASE)[0].enqueue(study)
        rates = []
        for loss_of_trial in (1.0, best, 1.1, 1.1, 1.1, 1.2, 1.2, 1.2, 1.2):
            trial = asked(study, wide)
            rates.append(trial.params.get("lr"))  # the default lies outside
            study.tell(trial, loss_of_trial)
        each_quarter += set(np.searchsorted(of_range, rates[5:])) == {0, 1, 2, 3}
    assert each_quarter == 8 if misled else each_quarter <= 2


def test_the_seed_and_the_study_decide_and_the_global_generator_does_not(
    space: SearchSpace,
) -> None:
    found = searched(study_of(space, 3), space, 12)
    np.random.seed(1)
    assert found == searched(study_of(space, 3), space, 12)
    assert found != searched(study_of(space, 4), space, 12)


def test_a_resumed_search_goes_on_as_it_would_have_done(space: SearchSpace) -> None:
    study = study_of(space, 3)
    found = searched(study, space, 12)
    resumed = optuna.create_study()
    resumed.add_trials(study.trials[:8])
    resumed.sampler = build_sampler("gp", space, 3, done=8)
    assert searched(resumed, space, 4) == found


def test_concurrent_trials_are_not_alike(space: SearchSpace) -> None:
    """Without the running ones, 16 suggestions from the same results would be close together."""
    study = study_of(space)
    searched(study, space, 8)
    together = [asked(study, space).params for _ in range(16)]
    rows = Encoding(space).encode(together)
    apart = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=2))
    assert apart.mean() > 0.5  # else 0.08


def test_a_small_space_is_not_tried_twice_before_all_of_it_is(tmp_path: Path) -> None:
    small = space_of(
        tmp_path,
        "parameters:\n  scheduler: {space: choice, categories: [linear, cosine, constant]}\n"
        "  prompt_length: {space: choice, categories: [4, 8]}\n",
    )
    study = study_of(small)
    for _ in range(4):
        asked(study, small)
    for trial in study.trials:
        study.tell(trial.number, float(trial.number))
    for _ in range(2):  # the first four may repeat, as a hypercube of six points
        asked(study, small)
    tried = {tuple(sorted(t.params.items())) for t in study.trials}
    first = {tuple(sorted(t.params.items())) for t in study.trials[:4]}
    assert len(tried) == len(first) + 2
    for _ in range(4):
        asked(study, small)  # and goes on when there is nothing new


def test_it_learns_from_a_default_outside_the_space(tmp_path: Path) -> None:
    """As from the nearest point."""
    narrow = space_of(tmp_path, SPACE.replace("1.0e-4", "2.0e-3"))
    nearby = {9.0: 0, 0.1: 0}  # if it is worse or better than all others; of 16 trials
    for value, seed in itertools.product(nearby, range(4)):
        study = study_of(narrow, seed)
        default, *_ = narrow.first_trials(BASE)
        assert default.params is None
        default.enqueue(study)
        assert asked(study, narrow).params == {}
        study.tell(0, value)
        for _ in range(4):
            study.tell(asked(study, narrow).number, 1.0)
        params = [asked(study, narrow).params for _ in range(4)]
        nearby[value] += sum(p["lr"] < 4e-3 and p["scheduler"] == "linear" for p in params)
    assert nearby[9.0] <= 2
    assert nearby[0.1] >= 6
    assert narrow.nearest(default.config) == {
        "lr": 1e-3,
        "scheduler": "linear",
        "warmup_steps": 100,
    }


@pytest.mark.parametrize(("text", "file"), [(NESTED, "space.yaml"), (PYTHON, "space.py")])
def test_a_conditional_parameter_is_learned(tmp_path: Path, text: str, file: str) -> None:
    """Only a polynomial has a power, and it should be 2."""
    space = space_of(tmp_path, text, file)
    by_sampler = {}
    for name in ("gp", "random"):
        best = []
        for seed in range(5):
            study = study_of(space, seed, name)
            for _ in range(20):
                trial = asked(study, space)
                params = trial.params
                assert ("power" in params) == (params["scheduler"] == "polynomial")
                power = abs(params["power"] - 2.0) if "power" in params else 1.0
                study.tell(trial, abs(math.log10(params["lr"]) + 2) + power)
            best.append(study.best_value)
        by_sampler[name] = float(np.mean(best))
    assert by_sampler["gp"] < 0.5 * by_sampler["random"]


def test_a_parameter_that_a_python_space_rarely_suggests_is_drawn(tmp_path: Path) -> None:
    """It was not seen when the function was tried, but candidates have it."""
    rare = PYTHON.replace(
        "    return",
        "    if 1.5e-2 < lr < 2.3e-2:\n        trial.suggest_int('seed', 1, 9)\n    return",
    )
    space = space_of(tmp_path, rare, "rare.py")
    assert "seed" not in space.sampled_names
    study = study_of(space)
    for _ in range(20):
        trial = asked(study, space)
        study.tell(trial, abs(math.log10(trial.params["lr"] / 1.8e-2)))
    drawn = {t.params["seed"] for t in study.trials if "seed" in t.params}
    assert len(drawn) > 1


def test_it_finds_more_than_chance(space: SearchSpace) -> None:
    def best(name: str) -> float:
        found = []
        for seed in range(5):
            study = study_of(space, seed, name)
            searched(study, space, 16)
            found.append(study.best_value)
        return float(np.mean(found))

    assert best("gp") < 0.5 * best("random")


def test_a_suggestion_is_learned_from_a_hundred_trials_at_most(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(space)
    rng = np.random.default_rng(0)
    for i in range(300):
        params = space.drawn(lambda _, d: rand(d, rng))
        value = -5.0 if i == 100 else loss(params)  # the best is kept, however old
        known = space.distributions()
        study.add_trial(create_trial(params=params, distributions=known, value=value))
    seen = []

    def recorded(points: np.ndarray, losses: np.ndarray, *rest: Any) -> np.ndarray:
        seen.append((len(points), losses.min()))
        return surrogate.expected_improvement(points, losses, *rest)

    monkeypatch.setattr("tune_app.study.gaussian_process.expected_improvement", recorded)
    for _ in range(5):
        asked(study, space)
    ((count, lowest),) = set(seen)
    assert 50 < count <= 100
    assert lowest == -5.0
