"""The command end to end: a real search on a real swarm, and mistakes that start nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from safetensors import safe_open

from benchmarks.relay import free_port
from tests.pages import ROOT
from tests.sockets import watched_sockets
from tests.tiny_models import write_tiny_model
from tune_app.apply import cli as apply
from tune_app.report.results import load
from tune_app.run.run_dir import RunDir
from tune_app.search.cli import main
from tune_app.search.ray_tune import cluster
from tune_app.serve import checks, connection

SMALL = ["--trials", "3", "--steps", "5", "--batch-size", "2", "--confirm", "1"]


def most_at_once(run: RunDir) -> int:
    at_once = most = 0
    for event in run.events():
        at_once += {"trial_started": 1, "trial_ended": -1}.get(event["event"], 0)
        most = max(most, at_once)
    return most


@pytest.fixture
def rays_folder() -> Iterator[Path]:
    """For Ray's logs. A short path: sockets are in there, too."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def check_password_is_kept(run: RunDir, logs: Path) -> None:
    """It is in the two files that --config and --resume take, which nobody else reads."""
    hold = [
        path
        for folder in (run.path, logs)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and b"hunter2" in path.read_bytes()
    ]
    assert sorted(hold) == [run.best_yaml, run.search_yaml]
    assert {path.stat().st_mode & 0o077 for path in hold} == {0}


@pytest.mark.swarm
@pytest.mark.timeout(400)
def test_a_real_search_on_a_real_swarm(
    tmp_path: Path, rays_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing leaks: no socket leads off this machine, and no file or page has the password."""
    run, sockets = RunDir(tmp_path / "run"), watched_sockets(tmp_path / "sockets")
    storage = f"sqlite:///file:{tmp_path / 'study.db'}?uri=true&password=hunter2"
    command = [sys.executable, "-m", "tune_app.search", *SMALL, "--confirm-seeds", "2"]
    command += ["--scheduler", "none", "--concurrency", "2", "--out", str(run.path)]
    config = tmp_path / "config.yaml"  # other processes see what stands in the command line
    config.write_text(f"storage: {storage}\n")

    with (
        subprocess.Popen(
            [*command, f"--config={config}"],
            env=sockets.environment | {"RAY_TMPDIR": str(rays_folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as search,
        sockets.of(search.pid),
    ):
        out, err = search.communicate(timeout=240)

    assert search.returncode == 0, err
    assert "the default" in out
    assert "Traceback" not in err
    assert "Warning" not in err
    assert sockets.outward() == set()
    assert {"gcs_server", "raylet", "p2pd"} <= sockets.seen_of
    assert "hunter2" not in out + err
    check_password_is_kept(run, rays_folder)
    trials = pd.read_csv(run.trials_csv)
    searched = trials[trials["origin"] != "confirm"]
    assert sorted(searched["trial"]) == [0, 1, 2]
    assert set(trials["status"]) == {"finished"}
    assert len(trials) == 3 + 2 * 2  # the best and the default, two seeds each
    assert most_at_once(run) == 2  # of the search and of the confirmation
    default = searched.set_index("trial").loc[0]
    assert (default["lr"], default["scheduler"], default["weight_decay"]) == (1e-3, "linear", 0)
    study = optuna.load_study(study_name=load(run).study, storage=storage)
    told = {trial.number: trial.value for trial in study.trials}
    for _, trial in searched.iterrows():
        assert told[trial["trial"]] == pytest.approx(trial["eval_loss"])
    assert yaml.safe_load(run.best_yaml.read_text())["trial"]["steps"] == 5
    with safe_open(run.prompts / "prompts.safetensors", "pt") as weights:
        assert weights.get_slice("prompt_embeddings").get_shape() == [8, 128]
        assert weights.get_slice("score").get_shape() == [8, 128]
    assert run.report_html.stat().st_size > 100_000
    # TensorBoard's files were copied, and Ray Tune has saved no trial.
    assert len({file.parent.name for file in run.ray.rglob("*tfevents*")}) == len(trials)
    saved = {file.read_text() for file in run.ray.rglob("experiment_state-*")}
    assert saved == {'{"trial_data": []}'}

    # The verdict's figures are means over the seeds; these are of the prompts that one gets.
    assert apply.main([str(run.path), "--evaluate", "--quiet"]) == 0
    evaluated = capsys.readouterr()
    figures = re.fullmatch(
        r"test: (loss \S+, accuracy [\d.]+, f1 [\d.]+) \(\d+ rows\)\n", evaluated.out
    )
    assert figures, evaluated.err
    said = f"Exported prompts: test {figures[1]} (confirmation run "
    for place in (out, run.summary_txt.read_text(), run.report_html.read_text()):
        assert said in " ".join(place.split())


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(connection, "PrivateSwarm", start)
    monkeypatch.setattr(cluster.ray, "init", start)


PEER = "/ip4/127.0.0.1/tcp/{port}/p2p/QmNNwDpHbX6QoBikkcX56A1HrhHuc7o1P7fW9n5m1pb3yd"


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheduler", "asah"], "Did you mean 'asha'?"),
        (["--space", "defualt"], "Did you mean 'default'?"),
        (["--trials", "0"], "--trials: must be 1 or more, got 0."),
        (["--prompt-length", "0"], "--prompt-length: must be 1 or more, got 0."),
        (["--prompt-length", "500"], "are 548 positions; demo has 512."),
        (["--train", "nowhere.csv"], "--train: there is no file 'nowhere.csv'."),
        (["--train", "empty.csv"], "is empty"),
        (["--train", "one_class.csv"], "at least two classes"),
        (["--train", "good.csv", "--label-column", "stars"], "stars"),
        (["--train", "good.csv", "--valid", "other.csv"], "labels that are not in good.csv: 'z'"),
        (["--model", "no_config"], "has no config.json"),
        (["--model", "gpt2_folder"], "weights of a gpt2 model: "),
        (["--model", "gpt2_folder", "--backbone", "local"], "weights of a gpt2 model: "),
        (["--model", "gpt2_folder", "--dry-run"], "weights of a gpt2 model: "),
        (["--peers", PEER], "--peers: no answer within 5 s"),
        (
            ["--peers", PEER, "--request-tokens", "40"],
            "are a row of 56; a request to the swarm can have 40 (see --request-tokens).",
        ),
        (["--out", "used"], "already contains a run"),
        (["--space", "bad_range.yaml"], "lower must be below upper"),
        (["--space", "bad_log.yaml"], "must be above 0 for loguniform"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--storage", "study.db"], "--storage: must be a URL such as sqlite:////folder/study.db"),
        (["--storage", "sqlite:////no/such/folder/x.db"], "unable to open database file"),
        (["--storage", "nosuch://host/db"], "cannot be opened as an Optuna storage"),
    ],
)
def test_a_mistake_has_one_message_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    good = "text,label\n" + "".join(f"text number {i},{'xy'[i % 2]}\n" for i in range(40))
    Path("good.csv").write_text(good)
    Path("other.csv").write_text("text,label\nsome text here,z\nmore text here,x\n")
    Path("one_class.csv").write_text("text,label\nsome text,x\nmore text,x\n")
    Path("empty.csv").touch()
    Path("broken.yaml").write_text("trials: [1\n")
    lr = "parameters:\n  lr: {space: loguniform, lower: %s, upper: 0.1}\n"
    Path("bad_range.yaml").write_text(lr % "1.0")
    Path("bad_log.yaml").write_text(lr % "0.0")
    Path("no_config").mkdir()
    Path("used").mkdir()
    Path("used/events.jsonl").write_text("{}\n")
    write_tiny_model("llama", Path("gpt2_folder"))
    config = Path("gpt2_folder/config.json")
    config.write_text(config.read_text().replace('"llama"', '"gpt2"'))
    arguments = [argument.format(port=free_port()) for argument in arguments]
    before = sorted(tmp_path.iterdir())

    assert main(arguments) == 2

    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("nothing_starts")
def test_several_mistakes_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["--trials", "0", "--space", "quik", "--train", "nowhere.csv"]) == 2

    error = capsys.readouterr().err
    for said in ("--trials", "Did you mean 'quick'?", "nowhere.csv"):
        assert said in error


@pytest.mark.usefixtures("nothing_starts")
def test_without_petals_a_swarm_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)

    assert main(["--trials", "1"]) == 2

    assert capsys.readouterr().err.splitlines() == [
        "a swarm needs petals: pip install --no-deps petals==2.2.0.post1 (or use --backbone local)"
    ]
    assert checks.INSTALL_PETALS in (ROOT / "pyproject.toml").read_text()
