"""What a population tries, and the searches that it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.trial_config import CHANGEABLE
from tune_app.search.checks import check_everything
from tune_app.study.explore import check_population, explore
from tune_app.study.parameter import contains
from tune_app.study.yaml_space import load_space


@pytest.mark.parametrize("name", ["default", "conditional", "deep"])
def test_what_is_tried_lies_in_the_space(name: str) -> None:
    space, base = load_space(name), SearchConfig(steps=60).base_trial()
    rng = random.Random(3)
    config = space.default_config(base)
    seen: dict[str, set[Any]] = {}
    for _ in range(300):
        new = explore(config, 12, space, base, rng)
        now = new.at(12)
        assert now.check() == []
        assert new.at(11) == config.at(11)
        assert now != config.at(11)
        assert {name for _, name, _ in new.changes} <= set(CHANGEABLE)
        values: dict[str, Any] = {}
        for parameter in space.parameters:
            value = getattr(now, parameter.name)
            if parameter.active(values):
                values[parameter.name] = value
                seen.setdefault(parameter.name, set()).add(value)
                if parameter.name in CHANGEABLE:
                    assert contains(parameter.distribution, value), (parameter, value)
            elif parameter.name in CHANGEABLE:
                assert value == getattr(base, parameter.name), parameter
        config = now  # a walk through the space
    for name in set(seen) & set(CHANGEABLE):
        assert len(seen[name]) > 1, name


def test_what_is_tried_follows_from_the_generator_alone() -> None:
    space, base = load_space("conditional"), SearchConfig().base_trial()
    state = random.getstate()
    tried = [explore(base, 12, space, base, random.Random(seed)) for seed in (1, 1, 2)]
    assert tried[0] == tried[1] != tried[2]
    assert random.getstate() == state


def test_a_neighbour_is_rays(tmp_path: Path) -> None:
    """Numbers are multiplied by 0.8 or 1.2, listed ones take the next; a quarter is drawn anew."""
    file = tmp_path / "space.yaml"
    file.write_text(
        "parameters:\n"
        "  lr: {space: loguniform, lower: 1.0e-6, upper: 1.0}\n"
        "  weight_decay: {space: choice, categories: [0.0, 0.1, 0.2, 0.3, 0.4]}\n"
        "  warmup_steps: {space: qrandint, lower: 0, upper: 100, q: 10}\n"
        "  scheduler: {space: choice, categories: [linear, cosine]}\n"
    )
    space, base, rng = load_space(str(file)), SearchConfig().base_trial(), random.Random(0)
    now = replace(base, lr=1e-2, weight_decay=0.2, warmup_steps=10)
    new = [explore(now, 12, space, base, rng).at(12) for _ in range(1000)]

    near = [c.lr for c in new if c.lr == pytest.approx(8e-3) or c.lr == pytest.approx(1.2e-2)]
    assert 700 < len(near) < 800
    assert 3 * 3 / 4 * 300 < sum(c.weight_decay in (0.1, 0.3) for c in new) < 900
    assert sum(c.warmup_steps in (0, 20) for c in new) > 700  # a step of the grid at least
    assert 50 < sum(c.scheduler == "cosine" for c in new) < 200  # words stay, unless drawn anew


def test_a_lineage_keeps_what_was_before_and_drops_what_would_come() -> None:
    space, base = load_space("default"), SearchConfig().base_trial()
    donor = replace(base, changes=((12, "lr", 0.02), (24, "lr", 0.03), (36, "lr", 0.04)))
    new = explore(donor, 24, space, base, random.Random(0))
    assert new.at(23) == donor.at(23)
    assert new.changes[0] == (12, "lr", 0.02)
    assert {step for step, _, _ in new.changes} == {12, 24}
    assert new.at(24).lr != 0.03


PBT = SearchConfig(scheduler="pbt", trials=8)


@pytest.mark.parametrize(
    ("config", "space", "said"),
    [
        (replace(PBT, trials=3), "", "--trials: --scheduler pbt needs 4 or more, got 3."),
        (replace(PBT, concurrency=4), "", "--concurrency: with --scheduler pbt all 8 trials"),
        (replace(PBT, steps=1), "", "--steps: --scheduler pbt compares trials while they train"),
        (
            PBT,
            "batch_size: {space: randint, lower: 2, upper: 8}",
            "needs a parameter that can change",
        ),
        (
            PBT,
            "steps: {space: randint, lower: 9, upper: 20}",
            "all trials must have the same number",
        ),
        (replace(PBT, trial={"steps": 9}), "", "all trials must have the same number of steps"),
    ],
)
def test_what_it_cannot_do_is_said_before(
    tmp_path: Path, config: SearchConfig, space: str, said: str
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(f"parameters: {{{space or 'lr: {space: uniform, lower: 0.1, upper: 0.2}'}}}")
    found = check_population(config, load_space(str(file)))
    assert [message for message in found if said in message], found
    with pytest.raises(ConfigError) as caught:
        check_everything(replace(config, space=str(file), backbone="local"))
    assert set(found) <= set(caught.value.messages)


def test_a_python_space_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "space.py"
    file.write_text("def space(trial):\n    trial.suggest_float('lr', 0.001, 0.1)\n")
    (message,) = check_population(PBT, load_space(str(file)))
    assert "a Python space" in message
