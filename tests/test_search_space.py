"""Search spaces: what files compile to, what Optuna makes of them, what is refused."""

from __future__ import annotations

import math
import pickle
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_app.run.search_config import ConfigError, TrialConfig
from tune_app.study.yaml_space import SearchSpace, load_space, shipped_spaces

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
BASE = TrialConfig()
NESTED = """
parameters:
  lr_end: {space: loguniform, lower: 1e-7, upper: 1e-5, when: {power: [2, 3]}}
  power: {space: choice, categories: [1, 2, 3], when: {scheduler: polynomial}}
  scheduler: {space: choice, categories: [linear, polynomial]}
  lr: {space: loguniform, lower: 1e-4, upper: 1e-1}
"""


def make(tmp_path: Path, text: str, name: str = "space.yaml") -> SearchSpace:
    (tmp_path / name).write_text(text)
    return load_space(str(tmp_path / name))


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, text)
    return "\n".join(caught.value.messages)


@pytest.mark.parametrize("name", ["default", "quick", "deep", "conditional"])
def test_shipped_space_contains_the_documented_default(name):
    space = load_space(name)
    for steps in (20, 100, 1000):
        base = replace(BASE, steps=steps)
        default = space.first_trials(base)[0]
        expected = replace(base, tuning_mode="deep_ptune" if name == "deep" else "ptune")
        assert (default.origin, default.config) == ("default", expected)
        assert default.params is not None
        kept = replace(expected, warmup_steps=min(expected.warmup_steps, expected.steps))
        assert space.trial_config(default.params, base) in (expected, kept)


@pytest.mark.parametrize("name", ["default", "quick", "deep", "conditional"])
def test_every_sample_of_a_shipped_space_is_a_valid_config(name):
    space = load_space(name)
    for params in space.sample(200, seed=1):
        assert space.trial_config(params, BASE).check() == []


def test_shipped_files_name_the_command_that_runs_them():
    for name, path in shipped_spaces().items():
        command = path.read_text().splitlines()[0]
        assert command.startswith("# python -m tune_app.search")
        assert name == "default" or f"--space {name}" in command


def test_children_follow_their_parents(tmp_path):
    space = make(tmp_path, NESTED)
    assert space.sampled_names == ("scheduler", "power", "lr_end", "lr")
    seen = set()
    for params in space.sample(100, seed=0):
        assert ("power" in params) == (params["scheduler"] == "polynomial")
        assert ("lr_end" in params) == (params.get("power") in (2.0, 3.0))
        seen.add(frozenset(params))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ("{space: randint, lower: 1, upper: 4}", 1, 3),
        ("{space: lograndint, lower: 1, upper: 4}", 1, 3),
        ("{space: qrandint, lower: 2, upper: 8, q: 2}", 2, 8),
        ("{space: qrandint, lower: 2, upper: 8, q: 1}", 2, 7),
    ],
)
def test_bounds_mean_what_they_mean_in_ray(tmp_path, spec, low, high):
    from ray import tune  # the reference

    space = make(tmp_path, f"parameters: {{prompt_length: {spec}}}")
    ours = {params["prompt_length"] for params in space.sample(200, seed=0)}
    distribution = space.distributions()["prompt_length"]
    assert (distribution.low, distribution.high) == (low, high)
    kind, _, rest = spec.strip("{}").removeprefix("space: ").partition(", ")
    numbers = dict(pair.split(": ") for pair in rest.split(", "))
    domain = getattr(tune, kind)(**{key: int(value) for key, value in numbers.items()})
    assert ours == set(domain.sample(size=2000, random_state=0))


def test_same_seed_gives_the_same_suggestions():
    space = load_space("conditional")

    def suggestions(seed: int) -> list[dict]:
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True)
        study = optuna.create_study(sampler=sampler)
        params = []
        for i in range(15):
            trial = study.ask()
            space(trial)
            params.append(trial.params)
            study.tell(trial, float(i % 4))
        return params

    assert suggestions(3) == suggestions(3)
    assert suggestions(3) != suggestions(4)


def test_tpe_learns_a_conditional_parameter(tmp_path):
    space = pickle.loads(pickle.dumps(make(tmp_path, NESTED)))  # as Ray sends it
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, group=True)
    study = optuna.create_study(sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        space(trial)
        params = trial.params
        if "power" not in params:
            return 2.0
        distance = abs(math.log10(params["lr_end"]) + 6) if "lr_end" in params else 1.0
        return abs(params["power"] - 2.0) + distance

    study.optimize(objective, n_trials=60)
    late = [trial.params for trial in study.trials[30:]]
    ends = [math.log10(params["lr_end"]) for params in late if "lr_end" in params]
    assert sum(params.get("power") == 2.0 for params in late) >= 12  # by chance 1 in 6: 5
    assert statistics.mean(abs(end + 6) for end in ends) < 0.35  # by chance 0.5


def test_first_trials_run_exactly_and_teach_optuna_only_points_of_the_space(tmp_path):
    space = make(
        tmp_path,
        "parameters: {lr: {space: loguniform, lower: 1e-2, upper: 1e-1}}\n"
        "enqueue: [{lr: 0.03}, {lr: 0.03}]\n",
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first = space.first_trials(BASE, trial={"lr": 0.05, "scheduler": "cosine"})
    assert [one.origin for one in first] == ["default", "default", "enqueued", "enqueued"]
    for one in first:
        one.enqueue(study)
    asked = []
    for _ in range(5):
        trial = study.ask()
        constants = space(trial) or {}
        asked.append((space.trial_config({**trial.params, **constants}, BASE), trial.params))
        study.tell(trial, 1.0)
    assert asked[0] == (BASE, {})  # lr 1e-3 lies outside
    assert asked[1] == (replace(BASE, warmup_steps=10), {})
    assert asked[2] == (replace(BASE, lr=0.05, scheduler="cosine"), {})  # so does a cosine
    assert asked[3] == (replace(BASE, lr=0.03), {"lr": 0.03})
    assert asked[4][0] == replace(BASE, **asked[4][1])
    assert asked[4][1].keys() == {"lr"}


@pytest.mark.parametrize(
    ("steps", "warmups"), [(1, [1]), (10, [10, 1]), (60, [60, 6]), (101, [100, 11]), (1000, [100])]
)
def test_a_default_that_warms_up_too_long_has_another_one_beside_it(steps, warmups):
    space, base = load_space("default"), replace(BASE, steps=steps)
    found = [config.num_warmup_steps() for config in space.baselines(base)]
    assert found == warmups
    rest = {replace(config, warmup_steps=0) for config in space.baselines(base)}
    assert len(rest) == 1


def test_default_is_found_in_a_space_of_warmup_ratios(tmp_path):
    space = make(tmp_path, "parameters: {warmup_ratio: {space: uniform, lower: 0, upper: 1}}")
    assert space.params_of(BASE, BASE) == {"warmup_ratio": 1.0}
    long = replace(BASE, steps=300)
    assert space.params_of(long, long) == {"warmup_ratio": pytest.approx(1 / 3)}
    odd = replace(BASE, steps=151)  # 100 / 151 * 151 is more than 100
    ratio = space.params_of(odd, odd)["warmup_ratio"]
    assert replace(odd, warmup_ratio=ratio).num_warmup_steps() == 100


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(100, 2000))
def test_params_of_undoes_trial_config(seed, steps):
    """Where no warmup is longer than the trial: that one is kept as the steps that it gets."""
    space, base = load_space("conditional"), replace(BASE, steps=steps)
    [params] = space.sample(1, seed)
    assert space.params_of(space.trial_config(params, base), base) == params


def test_all_mistakes_of_a_file_are_shown_together(tmp_path):
    text = """
lr: 3
parametrs: {}
parameters:
  lr: {space: logunifrm, lower: 1e-4, upper: 1e-1}
  schedular: {space: choice, categories: [linear]}
  scheduler: {space: choice, categories: [linaer, cosine]}
  eps: {space: loguniform, lower: 0, upper: 1e-8}
  beta1: {space: uniform, lower: 0.99, upper: 0.9}
  weight_decay: {space: uniform, lower: 0, uper: 1}
  num_cycles: {space: choice, categories: []}
  power: {space: choice, categories: [1.0], when: {factor: 0.1}}
  factor: {space: choice, categories: [0.1], when: {power: 1.0}}
  lr_end: {space: uniform, lower: 0, upper: 1, when: {patience: 3}}
  steps: {space: uniform, lower: 1, upper: 10}
fixed: {prompt_lenght: 3, batch_size: many}
enqueue: [{lr: x}, 3]
"""
    messages = refused(tmp_path, text)
    for expected in (
        "space.yaml: lr: must be below",
        "parametrs: unknown. Did you mean 'parameters'?",
        "parameters.lr.space: must be one of uniform",
        "Did you mean 'loguniform'?",
        "parameters.schedular: unknown. Did you mean 'scheduler'?",
        "got 'linaer'. Did you mean 'linear'?",
        "parameters.eps.lower: must be above 0",
        "parameters.beta1: lower must be below upper, got 0.99 and 0.9",
        "parameters.weight_decay.uper: uniform does not take it. Did you mean 'upper'?",
        "parameters.weight_decay.upper: missing",
        "parameters.num_cycles.categories: must be a list",
        "is circular: power needs factor needs power",
        "parameters.lr_end.when.patience: not a parameter",
        "parameters.steps.space: steps does not take uniform; use randint",
        "fixed.prompt_lenght: unknown. Did you mean 'prompt_length'?",
        "fixed.batch_size: must be a whole number, got 'many'",
        "enqueue[0].lr: must be a finite number",
        "enqueue[1]: must be a mapping",
    ):
        assert expected in messages


def test_values_that_a_trial_refuses(tmp_path):
    messages = refused(
        tmp_path,
        "parameters:\n"
        "  scheduler: {space: choice, categories: [linear, cosine]}\n"
        "  num_cycles: {space: choice, categories: [0.5]}\n"
        "  beta1: {space: uniform, lower: 0.9, upper: 1}\n",
    )
    assert "parameters.beta1: must be in [0, 1), got 1.0" in messages
    assert "scheduler 'linear' does not take it" in messages
    assert "when: {scheduler: ...}" in messages


def test_two_values_that_only_together_are_refused(tmp_path):
    messages = refused(
        tmp_path,
        "parameters:\n"
        "  scheduler: {space: choice, categories: [linear, inverse_sqrt]}\n"
        "  warmup_steps: {space: choice, categories: [10, 0]}\n",
    )
    assert "inverse_sqrt takes it from the warmup" in messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parameters:\n  lr: {space: loguniform\n  b: 3\n", "line 3, column"),
        ("fixed: {lr: 1}\nfixed: {lr: 2}\n", "key 'fixed' is given twice"),
        ("- a\n", "must have `key: value` lines, got list"),
        ("", "must name at least one parameter"),
        ("parameters: {lr: 3}", "parameters.lr: must be {space: KIND"),
        (
            "parameters:\n  scheduler: {space: choice, categories: [linear]}\n"
            "  power: {space: choice, categories: [1], when: {scheduler: polynomial}}\n",
            "'polynomial' is never suggested",
        ),
        (
            "parameters: {warmup_steps: {space: randint, lower: 0, upper: 9}}\n"
            "fixed: {warmup_ratio: 0.1}\n",
            "warmup_ratio takes precedence",
        ),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    assert expected in refused(tmp_path, text)


def test_misspelled_name_of_a_space():
    with pytest.raises(ConfigError, match="Did you mean 'default'"):
        load_space("defualt")


def test_difference_says_what_changed(tmp_path):
    old, same = make(tmp_path, NESTED), make(tmp_path, NESTED + "\nenqueue: [{lr: 0.03}]")
    assert old.difference(same) == []
    assert old.fingerprint() == same.fingerprint()
    wider = make(tmp_path, NESTED.replace("1e-1}", "1}"))
    assert old.difference(wider) == ["lr: loguniform 0.0001 to 0.1, now loguniform 0.0001 to 1"]
    assert old.fingerprint() != wider.fingerprint()
    assert old.incompatible_with(wider) == []
    other = make(tmp_path, NESTED.replace("[1, 2, 3]", "[1, 2, 3, 4]"))
    assert old.incompatible_with(other) == ["power"]


PYTHON = """
def space(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    if trial.suggest_categorical("scheduler", ["linear", "polynomial"]) == "polynomial":
        trial.suggest_float("power", 1, 3)
    return {"eps": lr * 1e-6}
"""


def test_python_space(tmp_path):
    space = pickle.loads(pickle.dumps(make(tmp_path, PYTHON, "space.py")))
    assert set(space.sampled_names) == {"lr", "scheduler", "power"}
    [params] = space.sample(1, seed=0)
    assert space.trial_config(params, BASE).eps == params["lr"] * 1e-6
    assert space.first_trials(BASE)[0].params is None  # its eps is not the default's
    recorded = make(tmp_path, space.text)
    assert space.difference(recorded) == []
    (tmp_path / "space.py").write_text(PYTHON + "# changed\n")
    code = f"from tune_app.study.yaml_space import load_space as l; print(l({str(tmp_path)!r} + '/space.yaml').difference(l({str(tmp_path)!r} + '/space.py')))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "python: code" in done.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def space(trial): trial.suggest_float('lrr', 0, 1)", "Did you mean 'lr'"),
        ("def space(trial): trial.suggest_float('lr', -1, 1)", "lr: must be above 0"),
        ("def space(trial): 1 / 0", "ZeroDivisionError"),
        ("def spaec(trial): pass", "cannot be loaded: KeyError"),
        ("def space(trial): pass", "suggests no parameter"),
    ],
)
def test_python_space_mistakes(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        make(tmp_path, text, "space.py")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, tune_app.study.yaml_space; tune_app.study.yaml_space.load_space('default');"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_warmup_longer_than_the_trial_is_kept_as_the_steps_that_it_gets(tmp_path):
    space = make(tmp_path, "parameters: {warmup_steps: {space: randint, lower: 400, upper: 500}}")
    assert space.longest_warmup() in (499, 500)
    short, long = replace(BASE, steps=10), replace(BASE, steps=1000)
    assert space.trial_config({"warmup_steps": 454}, short).warmup_steps == 10
    assert space.trial_config({"warmup_steps": 454}, long).warmup_steps == 454
