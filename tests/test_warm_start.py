"""What a new search takes over from earlier ones, by runs with events and no training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from synthetic_runs import write_run

from tune_app.report.results import load
from tune_app.report.summary import summary
from tune_app.run.event_log import append
from tune_app.run.run_dir import RunDir
from tune_app.run.run_state import RunState
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.search.warm_start import EarlierRun, check_warm_start, take_over
from tune_app.study.prior import ChoicePrior, NumberPrior, fitted, from_json, to_json
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space

SPACE = {
    "lr": {"space": "loguniform", "lower": 1e-4, "upper": 1.0},
    "scheduler": {
        "space": "choice",
        "categories": ["linear", "cosine", "constant_with_warmup", "polynomial"],
    },
    "warmup_steps": {"space": "randint", "lower": 0, "upper": 101},
}


def space_of(folder: Path, parameters: dict) -> SearchSpace:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump({"parameters": parameters}))
    return load_space(str(file))


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two searches of 100 steps whose valley lies at a learning rate of 9e-3."""
    folder = tmp_path_factory.mktemp("earlier")
    return [write_run(folder / name, 40, seed=i).path for i, name in enumerate("ab")]


def config_of(runs: list[Path], **more) -> SearchConfig:
    return SearchConfig(**{"warm_start": tuple(runs), "trials": 32, "steps": 100, **more})


def in_space(config: TrialConfig) -> bool:
    return config.scheduler in SPACE["scheduler"]["categories"]


def test_the_best_of_each_run_comes_first_then_the_second_of_each(runs, space) -> None:
    warm = take_over(config_of(runs), space)
    ranked = [
        [config for config in EarlierRun.read(run).ranked if in_space(config)] for run in runs
    ]
    expected = [ranked[0][0], ranked[1][0], ranked[0][1], ranked[1][1]]
    assert [config.lr for config in warm.first] == [config.lr for config in expected]
    assert [c.warmup_steps for c in warm.first] == [c.warmup_steps for c in expected]
    assert warm.first[0].weight_decay == 0  # not searched here: as all other trials have it
    assert take_over(config_of(runs), space) == warm
    assert len(take_over(config_of(runs, trials=8), space).first) == 1
    assert set(warm.trials) == set(map(str, runs))


def test_what_ranked_high_shapes_the_priors(runs, space) -> None:
    priors = {k: from_json(v) for k, v in take_over(config_of(runs), space).priors.items()}
    lr = priors["lr"]
    assert isinstance(lr, NumberPrior)
    assert math.log10(lr.center) == pytest.approx(-2.05, abs=0.3)
    # Drawn over three and a half decades; an eighth of the space's four is the least.
    assert 10**0.499 < lr.spread < 5
    assert isinstance(priors["scheduler"], ChoicePrior)
    assert min(priors["scheduler"].weights.values()) > 0


def test_weights_fall_with_the_rank_and_the_worse_half_has_none(runs) -> None:
    run = EarlierRun.read(runs[0])
    weights = [weight for _, weight in run.weighted()]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1)
    assert len(weights) == (len(run.ranked) + 1) // 2
    assert [config for config, _ in run.weighted()] == list(run.ranked[: len(weights)])


def test_what_is_counted_in_steps_is_a_share_of_the_run(runs, space) -> None:
    long, short = (take_over(config_of(runs, steps=steps), space) for steps in (100, 20))
    for before, now in zip(long.first, short.first, strict=True):
        assert now.lr == before.lr
        assert now.warmup_steps == round(before.warmup_steps / 5)
        assert now.steps == 20
    assert from_json(short.priors["warmup_steps"]).center == pytest.approx(
        from_json(long.priors["warmup_steps"]).center / 5, abs=0.5
    )


def test_only_values_of_the_new_space_are_taken(runs, tmp_path) -> None:
    lr = {"space": "loguniform", "lower": 1e-4, "upper": 5e-3}
    warmup = {"space": "qrandint", "lower": 0, "upper": 40, "q": 10}
    ratio = {"space": "uniform", "lower": 0.0, "upper": 0.4}
    warm = take_over(config_of(runs), space_of(tmp_path, {"lr": lr, "warmup_steps": warmup}))
    assert warm.first
    assert all(config.lr <= 5e-3 for config in warm.first)
    assert all(config.warmup_steps % 10 == 0 for config in warm.first)
    assert 1e-4 < from_json(warm.priors["lr"]).center < 5e-3
    # Whether a warmup was given in steps or as a ratio does not matter.
    by_ratio = take_over(config_of(runs), space_of(tmp_path, {"warmup_ratio": ratio}))
    steps = [c.num_warmup_steps() for c in EarlierRun.read(runs[0]).ranked]
    assert by_ratio.first[0].num_warmup_steps() in steps


@pytest.mark.parametrize(
    "prior", [NumberPrior(1e-2, 3.0), ChoicePrior({None: 1.0, 0.5: 2.0, "linear": 0.0})]
)
def test_a_prior_survives_json(prior) -> None:
    assert from_json(yaml.safe_load(yaml.safe_dump(to_json(prior)))) == prior


def test_a_fitted_prior_leaves_room(space) -> None:
    lr, scheduler, warmup = (parameter.distribution for parameter in space.parameters)
    assert fitted([(1e-2, 1.0), (1e-2, 3.0)], lr) == NumberPrior(
        pytest.approx(1e-2), pytest.approx(10**0.5)
    )
    assert fitted([(10, 1.0), (50, 3.0)], warmup).center == pytest.approx(40)
    weights = fitted([("cosine", 1.0)], scheduler).weights
    assert weights["cosine"] > 0.8
    assert weights["linear"] == pytest.approx(1 / 16)


def test_a_space_expects_what_was_taken_over_in_place_of_its_own_priors(tmp_path) -> None:
    lr = {**SPACE["lr"], "prior": {"center": 1e-3, "spread": 2}}
    eps = {
        "space": "loguniform",
        "lower": 1e-9,
        "upper": 1e-7,
        "prior": {"center": 1e-8, "spread": 2},
    }
    space, taken = space_of(tmp_path, {"lr": lr, "eps": eps}), {"lr": NumberPrior(1e-2, 3.0)}
    expected = {p.name: p.prior for p in space.expecting(taken).parameters}
    assert expected == {"lr": NumberPrior(1e-2, 3.0), "eps": NumberPrior(1e-8, 2.0)}
    without = {p.name: p.prior for p in space.expecting(taken, own=False).parameters}
    assert without == {"lr": NumberPrior(1e-2, 3.0), "eps": None}


def test_what_was_taken_over_is_kept_and_said(runs, space, tmp_path) -> None:
    warm = take_over(config_of(runs), space)
    run = RunDir(write_run(tmp_path / "new", 12).path)
    append(run, warm)
    assert RunState.read(run).warm == warm
    text = " ".join(summary(load(run), 100).split())
    assert f"Warm start from {runs[0]} ({warm.trials[str(runs[0])]} trials) and {runs[1]} (" in text
    assert "Run first: 4 of their best configs. Expected: lr around" in text
    none = summary(load(write_run(tmp_path / "other", 4)), 100)
    assert "Warm start" not in none


def test_mistakes_are_found_before_anything_starts(runs, space, tmp_path) -> None:
    started = RunDir(tmp_path / "started").create()
    started.append_event({"event": "search_started", "trials": 3, "sampled": ["lr"]})
    given = (tmp_path / "nowhere", started.path, tmp_path / "mine", runs[0])
    messages = check_warm_start(config_of([*given], out=tmp_path / "mine"), space)
    assert len(messages) == 3
    assert "nowhere' is not a run's folder" in messages[0]
    assert "no trial of" in messages[1]
    assert "mine' is this run itself" in messages[2]
    other = space_of(tmp_path, {"eps": {"space": "loguniform", "lower": 1e-9, "upper": 1e-7}})
    (message,) = check_warm_start(config_of(runs[:1]), other)
    assert "no parameter in common with the space: it varied lr, num_cycles" in message
    (message,) = check_warm_start(config_of(runs, resume=runs[0].parent / "c"), space)
    assert "is for the beginning of a search" in message
    assert check_warm_start(config_of(runs), space) == []
    with pytest.raises(ConfigError, match="is not a run's folder"):
        take_over(replace(config_of(runs), warm_start=(tmp_path,)), space)
