"""Wrong inputs by the dozen, through the real command: exit code 2, one message, no traceback, and
nothing started or left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from tune_app.search.cli import main
from tune_app.search.ray_tune import cluster
from tune_app.serve import connection

LOCAL = "--backbone local"
DATA = f"{LOCAL} --train good.csv"
PEER = "/ip4/127.0.0.1/tcp/9/p2p/QmNNwDpHbX6QoBikkcX56A1HrhHuc7o1P7fW9n5m1pb3yd"
LONG = "x" * 5000
# What is typed -> what the message has to say.
WRONG = {
    # flags
    "--trails 3": "Did you mean '--trials'?",
    "--trials": "--trials: needs a value.",
    "--trials three": "--trials: must be a whole number",
    "--trials 1.5": "--trials: must be a whole number",
    "--trials -1": "--trials: must be 1 or more",
    "--trials 1e400": "--trials: must be a whole number",
    "--steps 0": "--steps: must be 1 or more",
    "--batch-size 0": "--batch-size: must be 1 or more",
    "--max-length 0": "--max-length: must be 1 or more",
    "--prompt-length -3": "--prompt-length: must be 1 or more",
    "--concurrency 0": "--concurrency: must be 1 or more",
    "--hosts 0": "--hosts: must be 1 or more",
    "--confirm -1": "--confirm: must be 0 or more",
    "--confirm-seeds 0": "--confirm-seeds: must be 1",
    "--seed -1": "--seed: must be 0 or more",
    "--seed x": "--seed: must be a whole number",
    "--time-budget soon": "--time-budget: must be seconds",
    "--time-budget -5": "--time-budget: must be",
    "--token-budget many": "--token-budget: must be a number of tokens",
    "--token-budget 0": "--token-budget: must be",
    "--sampler tpee": "Did you mean 'tpe'?",
    "--scheduler hyper": "--scheduler: must be one of",
    "--task classify": "--task: must be one of",
    "--backbone here": "--backbone: must be one of",
    "--executor threads": "--executor: must be one of",
    "--executor in-process --address auto": "--address: needs Ray",
    "--executor in-process --scheduler pbt": "--scheduler: needs Ray",
    "--tuning-mode deep": "--tuning-mode: must be one of",
    "--dtype float": "--dtype: must be one of",
    "--device gpu": "--device: must be cpu, cuda",
    f"{LOCAL} --device cuda:7": "--device: there is no cuda:7",
    # paths
    "--model ~no-such-user/m": "--model: must be demo",
    f"{LOCAL} --train ~no-such-user/a.csv": "--train: there is no file '~no-such-user/a.csv'",
    f"{LOCAL} --train {LONG}": "--train: there is no file",
    "--space ~no-such-user/s.yaml": "~no-such-user/s.yaml: cannot be read",
    "--resume ~no-such-user/r": "--resume: there is no run in '~no-such-user/r'",
    f"--resume {LONG}": "--resume: cannot be a path: File name too long",
    f"--out {LONG}": "--out: cannot be a path: File name too long",
    f"--model {LONG}": "--model: must be demo",
    "--quiet --verbose": "--quiet: contradicts --verbose",
    "stray": "settings are given as flags",
    "--allow-changed-space": "only with --resume",
    "--storage study.db": "--storage: must be a URL",
    "--storage nosuch://host/db": "cannot be opened as an Optuna storage",
    # swarms
    "--peers somewhere": "--peers: must be multiaddresses",
    f"--peers {PEER.replace('127.0.0.1', '300.0.0.1')}": "--peers: must be multiaddresses",
    f"--peers {PEER}": "--peers: no answer",
    f"{LOCAL} --peers {PEER}": "--peers: only with --backbone swarm",
    "--request-tokens 40": "--request-tokens: only with --peers",
    # folders
    "--out good.csv": "--out: must be a folder",
    "--out good.csv/run": "cannot be written",
    "--out used": "already contains a run",
    "--resume empty": "there is no run in",
    "--resume nowhere": "there is no run in",
    # models
    "--model nowhere": "--model: must be demo, a model's folder or a hub name",
    f"{LOCAL} --model empty": "has no config.json",
    f"{LOCAL} --model torn": "config.json",
    f"{LOCAL} --model weightless": "weights",
    f"{LOCAL} --model strange": "does not know",
    f"{LOCAL} --prompt-length 600": "positions",
    # data
    f"{LOCAL} --valid good.csv": "--valid: needs --train",
    f"{LOCAL} --text-column text": "is for your own data",
    f"{LOCAL} --task causal-lm --label-column label": "--label-column: not with --task causal-lm",
    f"{LOCAL} --train nowhere.csv": "--train: there is no file",
    f"{LOCAL} --train empty": "empty",
    f"{LOCAL} --train empty.csv": "is empty",
    f"{LOCAL} --train good.docx": "good.docx",
    f"{LOCAL} --train torn.parquet": "torn.parquet",
    f"{LOCAL} --train torn.jsonl": "torn.jsonl",
    f"{LOCAL} --train one_class.csv": "at least two classes",
    f"{DATA} --valid strange.csv": "labels that are not in good.csv",
    f"{DATA} --label-column stars": "stars",
    f"{DATA} --text-column body": "body",
    f"{LOCAL} --train text.txt": "text.txt",
    # spaces
    "--space defualt": "Did you mean 'default'?",
    "--space nowhere.yaml": "nowhere.yaml: cannot be read",
    "--space nowhere.py": "nowhere.py",
    "--space torn.yaml": "torn.yaml",
    "--space list.yaml": "must have `key: value` lines",
    "--space unknown.yaml": "Did you mean 'lr'?",
    "--space bounds.yaml": "lower must be below upper",
    "--space log.yaml": "must be above 0 for loguniform",
    "--space kind.yaml": "Did you mean 'loguniform'?",
    "--space twice.yaml": "is given twice",
    "--space raises.py": "raises.py:space: failed",
    "--space wrong.py:other": "wrong.py:other: cannot be loaded",
    "--space nothing.py": "suggests no parameter",
    # configs
    "--config nowhere.yaml": "nowhere.yaml: cannot be read",
    "--config torn.yaml": "torn.yaml",
    "--config typo.yaml": "Did you mean 'trials'?",
    "--config types.yaml": "must be a whole number",
    "--config trial.yaml": "trial: lr: must be above 0",
    "--config latin.yaml": "latin.yaml: cannot be read",
}
FILES = {
    "good.csv": "text,label\n" + "".join(f"text number {i},{'xy'[i % 2]}\n" for i in range(40)),
    "good.docx": "text",
    "empty.csv": "",
    "one_class.csv": "text,label\nsome text,x\nmore text,x\n",
    "strange.csv": "text,label\nsome text,z\nmore text,x\n",
    "text.txt": "no labels here\n",
    "torn.jsonl": '{"text": "a", "label": ',
    "torn.yaml": "trials: [1\n",
    "list.yaml": "- 1\n- 2\n",
    "unknown.yaml": "parameters: {lrr: {space: uniform, lower: 0.1, upper: 1}}\n",
    "bounds.yaml": "parameters: {lr: {space: uniform, lower: 1.0, upper: 0.1}}\n",
    "log.yaml": "parameters: {lr: {space: loguniform, lower: 0.0, upper: 0.1}}\n",
    "kind.yaml": "parameters: {lr: {space: loguniformm, lower: 0.01, upper: 0.1}}\n",
    "twice.yaml": "fixed: {lr: 0.1}\nfixed: {lr: 0.2}\n",
    "raises.py": "def space(trial):\n    trial.suggest_float('lr', 0.1, 1)\n    return 1 / 0\n",
    "wrong.py": "def space(trial):\n    pass\n",
    "nothing.py": "def space(trial):\n    pass\n",
    "typo.yaml": "trails: 3\n",
    "types.yaml": "trials: many\n",
    "trial.yaml": "trial: {lr: -1}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    (folder / "latin.yaml").write_bytes("# größer\ntrials: 3\n".encode("latin-1"))
    (folder / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    for name in ("empty", "used", "torn"):
        (folder / name).mkdir()
    (folder / "used" / "events.jsonl").write_text("{}\n")
    (folder / "torn" / "config.json").write_text('{"model_type": ')
    for name in ("weightless", "strange"):
        write_tiny_model("llama", folder / name)
    for weights in (folder / "weightless").glob("*.safetensors"):
        weights.unlink()
    config = folder / "strange" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "no_such_family"}))
    return folder


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(connection, "PrivateSwarm", start)
    monkeypatch.setattr(cluster.ray, "init", start)


@pytest.mark.parametrize("typed", WRONG)
def test_one_message_and_exit_code_2(
    typed: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))

    assert main(typed.split()) == 2

    said = capsys.readouterr()
    assert WRONG[typed] in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    left = [path for path in folder.rglob("*") if path not in before]
    assert [path for path in left if "__pycache__" not in path.parts] == []


def test_there_are_many() -> None:
    assert len(WRONG) >= 60
