"""Configuration: precedence, conversion, and every mistake named, all of them together."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tune_app.run.config_checks import check_search_config
from tune_app.run.flags import build_parser, parse_search_args
from tune_app.run.search_config import (
    SCHEDULER_ARGUMENTS,
    SETTINGS,
    ConfigError,
    SearchConfig,
    TrialConfig,
)

PEER = "/ip4/10.1.2.3/tcp/31337/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def mistakes(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_search_args(argv)
    return caught.value.messages


def test_config_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert error.messages == ["one", "two"]
    assert str(error) == "- one\n- two"
    assert str(ConfigError("one")) == "one"


def test_every_field_is_a_flag_with_help():
    shown = [name for name, known in SETTINGS.items() if known.group]
    fields = [field.name for field in dataclasses.fields(SearchConfig)]
    assert sorted([*shown, "trial"]) == sorted(fields)
    text = build_parser().format_help()
    assert all(" ".join(SETTINGS[name].help.split()[:2]) in text for name in shown)
    assert all(f"--{name.replace('_', '-')}" in text for name in shown)
    assert "(default: 16)" in text
    assert "example:" in text


def test_help_is_quick_and_exits_with_0():
    code = (
        "import sys\nfrom tune_app.run.flags import parse_search_args\n"
        "try: parse_search_args(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'ray', 'transformers', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m tune_app.search [flags]")


def test_no_flags_give_the_defaults():
    assert parse_search_args([]) == SearchConfig()
    assert check_search_config(SearchConfig()) == []
    assert SearchConfig().base_trial() == TrialConfig(steps=SearchConfig().steps)


def test_defaults_below_yaml_below_flags(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("batch-size: 1e1\nmax_length: 32\ntrials: 4\ntext_column: 0\nquiet: true\n")
    config = parse_search_args(["--config", str(file), "--trials", "5", "--no-quiet"])
    assert config == SearchConfig(batch_size=10, max_length=32, trials=5, text_column="0")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--time-budget", "600"], "time_budget", 600.0),
        (["--time-budget", "10m"], "time_budget", 600.0),
        (["--time-budget", "2h"], "time_budget", 7200.0),
        (["--token-budget", "5e6"], "token_budget", 5_000_000),
        (["--token-budget", "5M"], "token_budget", 5_000_000),
        (["--steps", "1e3"], "steps", 1000),
        (["--out=runs/a"], "out", Path("runs/a")),
        (["--dry-run"], "dry_run", True),
        (["--peers", PEER, PEER], "peers", (PEER, PEER)),
        (["--peers", PEER, "--peers", PEER], "peers", (PEER, PEER)),
    ],
)
def test_flag_values(argv, field, value):
    assert getattr(parse_search_args(argv), field) == value


def test_all_mistakes_of_flags_and_yaml_together(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("trails: 3\nsampler: tpee\nsteps: many\n")
    argv = ["--batchsize", "4", "--backbone", "swram", "--trials", "1.5", "extra", "--model"]
    messages = "\n".join(mistakes("--config", str(file), *argv, "--token-budget", "lots"))
    for expected in (
        "my.yaml: trails: unknown. Did you mean 'trials'?",
        "my.yaml: sampler: must be one of tpe, random, gp, cmaes; got 'tpee'. Did you mean 'tpe'?",
        "my.yaml: steps: must be a whole number, got 'many'",
        "--batchsize: unknown flag. Did you mean '--batch-size'?",
        "--backbone: must be one of swarm, local; got 'swram'. Did you mean 'swarm'?",
        "--trials: must be a whole number, got '1.5'",
        "--model: needs a value",
        "--token-budget: must be a number of tokens such as 5e6 or 5M; got 'lots'",
    ):
        assert expected in messages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trials: 3\n  steps: 4\n", "line 2, column 8: not valid YAML"),
        ("trials: 3\ntrials: 4\n", "key 'trials' is given twice"),
        ("3\n", "must have `key: value` lines"),
        ("trials: true\n", "trials: must be a whole number, got True"),
        ("label_column: no\n", "label_column: must be text"),
        ("quiet: maybe\n", "quiet: must be true or false"),
        ("steps: null\n", "steps: must be a whole number, got None"),
        ("time_budget: .inf\n", "time_budget: must be seconds"),
    ],
)
def test_bad_yaml(tmp_path, text, expected):
    (tmp_path / "my.yaml").write_text(text)
    assert expected in "\n".join(mistakes("--config", str(tmp_path / "my.yaml")))


def test_missing_config_file():
    assert mistakes("--config", "nowhere.yaml") == [
        "nowhere.yaml: cannot be read: No such file or directory."
    ]


def test_resume_takes_the_settings_of_the_run(tmp_path):
    begun = SearchConfig(trials=20, seed=3, out=tmp_path, dry_run=False)
    (tmp_path / "search.yaml").write_text(begun.to_yaml())
    (tmp_path / "events.jsonl").touch()
    config = parse_search_args(["--resume", str(tmp_path), "--trials", "40"])
    assert config == replace(begun, trials=40, resume=tmp_path)
    assert check_search_config(config) == []


@settings(deadline=None)  # a machine that does something else as well is not a mistake
@given(
    lr=st.floats(1e-8, 1, exclude_min=True),
    trials=st.integers(1, 10**6),
    budget=st.none() | st.floats(1, 1e9),
    column=st.none() | st.text(min_size=1).filter(str.isprintable),
)
def test_yaml_round_trip(tmp_path_factory, lr, trials, budget, column):
    trial = TrialConfig(lr=lr).to_dict()
    config = SearchConfig(
        trials=trials, time_budget=budget, text_column=column, trial=trial, peers=(PEER,)
    )
    file = tmp_path_factory.getbasetemp() / "best.yaml"
    file.write_text(config.to_yaml(), "utf-8")
    assert SearchConfig.from_yaml(file) == config
    assert parse_search_args(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trials": 0}, "--trials: must be 1 or more, got 0"),
        ({"prompt_length": 0}, "--prompt-length: must be 1 or more"),
        ({"confirm_seeds": 0}, "--confirm-seeds: must be 1 or more"),
        ({"seed": -1}, "--seed: must be 0 or more"),
        ({"time_budget": 0.0}, "--time-budget: must be 1 or more"),
        ({"valid": "v.csv"}, "--valid: needs --train"),
        ({"train": "nowhere.csv"}, "--train: there is no file 'nowhere.csv'"),
        ({"label_column": "y"}, "--label-column: is for your own data"),
        ({"model": "dmeo"}, "Did you mean 'demo'?"),
        ({"model": "a/b/c"}, "--model: must be demo, a model's folder or a hub name"),
        ({"model": "tests"}, "the folder 'tests' has no config.json"),
        ({"backbone": "local", "peers": (PEER,)}, "only with --backbone swarm"),
        ({"peers": ("10.1.2.3:80",)}, "--peers: must be multiaddresses such as"),
        ({"peers": (PEER.replace("10.1.2.3", "10.1.2.333"),)}, "--peers: must be multiaddresses"),
        ({"peers": (PEER.replace("31337", "313370"),)}, "--peers: must be multiaddresses"),
        ({"dtype": "flaot32"}, "Did you mean 'float32'?"),
        ({"device": "gpu"}, "--device: must be cpu, cuda, cuda:N or mps, got 'gpu'"),
        ({"resume": Path("nowhere")}, "--resume: there is no run in 'nowhere'"),
        ({"allow_changed_space": True}, "only with --resume"),
        ({"request_tokens": 2048}, "--request-tokens: only with --peers"),
        ({"request_tokens": 0, "peers": (PEER,)}, "--request-tokens: must be 1 or more, got 0"),
        ({"storage": "study.db"}, "--storage: must be a URL"),
        ({"quiet": True, "verbose": True}, "contradicts --verbose"),
        ({"trial": {"lrr": 1}}, "trial: lrr: unknown. Did you mean 'lr'?"),
        ({"trial": {"lr": -1}}, "trial: lr: must be above 0, got -1.0"),
    ],
)
def test_what_is_checked_before_anything_starts(monkeypatch, changes, expected):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert expected in "\n".join(check_search_config(replace(SearchConfig(), **changes)))


def test_good_values_pass(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "train.csv").write_text("text\n")
    config = SearchConfig(
        model=str(tmp_path), train=str(tmp_path / "train.csv"), valid="hf://data/valid.csv",
        peers=(PEER, "/dns/host.example/tcp/1/p2p/" + PEER[-46:]), device="cuda:1",
    )  # fmt: skip
    assert check_search_config(config) == []
    assert check_search_config(SearchConfig(model="org/name-7b")) == []


def test_files_that_exist_already(tmp_path):
    (tmp_path / "events.jsonl").touch()
    config = SearchConfig(out=tmp_path, train=str(tmp_path / "events.jsonl"))
    empty, taken = check_search_config(config)
    assert "is empty" in empty
    assert f"resume that run: --resume {tmp_path}" in taken


def test_trial_config_from_dict():
    base = TrialConfig(steps=7)
    config = TrialConfig.from_dict({"lr": "1e-2", "warmup-steps": 5.0, "power": None}, base)
    assert config == TrialConfig(lr=0.01, warmup_steps=5, steps=7)
    with pytest.raises(ConfigError) as caught:
        TrialConfig.from_dict({"lrr": 1, "eps": "small", "amsgrad": 1})
    assert caught.value.messages == [
        "lrr: unknown. Did you mean 'lr'?",
        "eps: must be a finite number, got 'small'.",
        "amsgrad: must be true or false, got 1.",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 0.0}, "lr: must be above 0"),
        ({"beta2": 1.0}, "beta2: must be in [0, 1)"),
        ({"eps": 0.0}, "eps: must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay: must be 0 or more"),
        ({"scheduler": "cosin"}, "Did you mean 'cosine'?"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: must be in [0, 1]"),
        ({"prompt_length": 0}, "prompt_length: must be 1 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: must be above 0"),
        ({"power": 2.0}, "scheduler 'linear' does not take it (only polynomial)"),
        ({"scheduler": "cosine_with_restarts", "num_cycles": 1.5}, "must be a whole number"),
        ({"scheduler": "polynomial", "lr_end": 0.1}, "0 or more and below lr (0.001)"),
        ({"scheduler": "inverse_sqrt", "warmup_steps": 0}, "set warmup_steps to 1 or more"),
        ({"scheduler": "reduce_lr_on_plateau", "factor": 1.0}, "between 0 and 1"),
        ({"scheduler": "cosine_with_min_lr"}, "min_lr_rate: cosine_with_min_lr needs it"),
        ({"scheduler": "cosine_warmup_with_min_lr", "min_lr_rate": 1.5}, "must be in [0, 1]"),
        ({"scheduler": "warmup_stable_decay"}, "num_decay_steps: warmup_stable_decay needs it"),
        ({"scheduler": "warmup_stable_decay", "num_decay_steps": -1}, "must be 0 or more"),
        ({"min_lr_ratio": 0.1}, "does not take it (only warmup_stable_decay)"),
    ],
)
def test_what_a_trial_refuses(changes, expected):
    [message] = TrialConfig(**changes).check()
    assert expected in message


def test_warmup_is_capped_and_ignored_where_there_is_none():
    assert TrialConfig(steps=40).num_warmup_steps() == 40
    assert TrialConfig(steps=400, warmup_ratio=0.05).num_warmup_steps() == 20
    assert TrialConfig(steps=401, warmup_ratio=0.05).num_warmup_steps() == 21  # rounded up
    assert TrialConfig(scheduler="constant").num_warmup_steps() == 0


def test_schedulers_are_those_of_transformers():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULER_ARGUMENTS) == {kind.value for kind in SchedulerType} - {"greedy"}
    for name, arguments in SCHEDULER_ARGUMENTS.items():
        if name != "reduce_lr_on_plateau":  # torch's own class has its arguments
            code = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)].__code__
            assert set(arguments) == set(code.co_varnames[: code.co_argcount]) - {
                "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch",
                "min_lr", "num_stable_steps",  # each another way to say what is there
            }  # fmt: skip


def test_changes_on_the_way_are_values_like_any_others():
    given = {"lr": "1e-2", "steps": 20, "changes": [[8, "lr", "1e-3"], [12, "scheduler", "cosine"]]}
    trial = TrialConfig.from_dict(given)
    assert trial.changes == ((8, "lr", 1e-3), (12, "scheduler", "cosine"))
    assert trial.check() == []
    assert TrialConfig.from_dict(trial.to_dict()) == trial
    assert trial.at(7) == replace(trial, changes=())
    assert trial.at(8) == replace(trial, changes=(), lr=1e-3)
    assert (trial.at(19).lr, trial.at(19).scheduler) == (1e-3, "cosine")
    assert list(trial.phases()) == [0, 8, 12]
    assert "changes" not in TrialConfig().to_dict()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([[4, "batch_size", 2]], "'batch_size' cannot change while a trial trains"),
        ([[4, "warmup_step", 2]], "Did you mean 'warmup_steps'?"),
        ([[4, "lr", "fast"]], "must be a finite number, got 'fast'"),
        ([[4, "lr"]], "must be a list of [step, name, value], got [4, 'lr']"),
        ("lr", "must be a list of [step, name, value], got 'lr'"),
        ([[100, "lr", 1.0]], "changes: must be after steps 1 to 99, got 100."),
        ([[4, "lr", -1.0]], "changes after step 4: lr: must be above 0, got -1.0."),
        ([[4, "power", 2.0]], "scheduler 'linear' does not take it"),
    ],
)
def test_mistakes_in_changes_are_found(changes, said):
    assert any(
        said in message
        for message in check_search_config(SearchConfig(trial={"changes": changes}, steps=100))
    )
