"""Machines where the usual places will not do: a long TMPDIR, a home that cannot be written, a
folder that is nobody's, too little memory, a study that another process holds, a full disk, another
working folder."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy

from tests.trained import flags
from tune_app.apply import cli as apply
from tune_app.report.results import load
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search import cli
from tune_app.search.ray_tune.places import ways_round
from tune_app.study import storage
from tune_app.train import cli as training


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    return monkeypatch


def test_usual_places_stay(plain: pytest.MonkeyPatch) -> None:
    assert ways_round() == {}


def test_sockets_have_room_where_the_temporary_folder_is_long(plain: pytest.MonkeyPatch) -> None:
    plain.setattr("tempfile.tempdir", "/tmp/" + "long" * 12)

    place = ways_round()["RAY_TMPDIR"]

    socket = "/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"
    assert len(place + socket) <= 107


def searched(
    folder: Path, *more: str, killed: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the command says of a search on a tiny model, while whatever process of it has `killed`
    in its command line is killed, as the kernel does where memory is short."""
    told = [*flags(folder), f"--out={folder / 'run'}", "--trials=1", "--confirm=0", *more]
    with subprocess.Popen(
        [sys.executable, "-m", "tune_app.search", *told],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        while killed and command.poll() is None:
            with suppress(psutil.Error):
                for child in psutil.Process(command.pid).children(recursive=True):
                    if killed in " ".join(child.cmdline()):
                        child.kill()
            time.sleep(0.05)
        said = command.communicate()[1]
    return subprocess.CompletedProcess(command.args, command.returncode, stderr=said)


@pytest.mark.slow
@pytest.mark.swarm
def test_a_swarm_serves_where_the_temporary_folder_is_long(tmp_path: Path) -> None:
    """libp2p, torch and multiprocessing put sockets there, in the servers and in their client."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    search = searched(tmp_path, "--backbone=swarm", "--executor=in-process", TMPDIR=str(long))
    assert search.returncode == 0, search.stderr


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.parametrize(
    ("more", "killed", "environment", "why"),
    [
        ([], "", {"RAY_TMPDIR": "/proc/nowhere"}, "Ray did not start: "),
        ([], "TrialHost", {}, "A trial host died several times while it loaded the model"),
        (["--backbone=swarm"], "server_process", {}, "The private swarm did not start: "),
        (
            ["--backbone=swarm", "--executor=in-process"],
            "server_process",
            {},
            "The private swarm did not start: ",
        ),
    ],
    ids=["ray", "host", "swarm", "swarm, in process"],
)
def test_what_does_not_start_is_said_without_a_traceback(
    tmp_path: Path, more: list[str], killed: str, environment: dict[str, str], why: str
) -> None:
    search = searched(tmp_path, *more, killed=killed, **environment)
    assert search.returncode == 1
    assert why in search.stderr
    assert "Traceback" not in search.stderr


def test_rays_token_has_a_place_where_home_cannot_be_written(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("HOME", "/proc")  # nobody writes there, not even root

    token = Path(ways_round()["RAY_AUTH_TOKEN_PATH"])

    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0


def test_searches_that_start_at_once_in_a_new_home_share_one_token(
    plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / ".ray" / "auth_token"

    def start(_: int) -> str:
        assert ways_round() == {}
        return token.read_text()

    with ThreadPoolExecutor(8) as searches:
        read = set(searches.map(start, range(8)))

    assert read == {token.read_text()}
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


def test_a_run_that_cannot_be_written_is_one_line() -> None:
    with (
        pytest.raises(ConfigError, match=r"^--out: /proc/run cannot be written: "),
        RunDir("/proc/run").lock(),
    ):
        pass


def test_a_study_that_is_held_is_waited_for_then_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.2)
    monkeypatch.setattr("time.sleep", lambda _: None)  # Optuna tries again after seconds
    config, run = SearchConfig(out=tmp_path / "run"), RunDir(tmp_path / "run")
    study = storage.open_study(config, run, "tune_app")
    holder = sqlite3.connect(run.study_db)
    holder.execute("BEGIN EXCLUSIVE")

    with pytest.raises(
        (optuna.exceptions.StorageInternalError, sqlalchemy.exc.OperationalError)
    ) as e:
        study.ask()

    assert storage.is_locked(e.value)
    assert not storage.is_locked(ValueError("another"))

    def searches(*_: object) -> int:
        raise RuntimeError("Ray's own") from e.value

    monkeypatch.setattr(cli, "check_everything", searches)
    assert cli.main(["--executor=in-process"]) == 1
    said = capsys.readouterr().err
    assert "Another process locked the study" in said
    assert "Traceback" not in said
    holder.rollback()
    assert study.ask().number == 0  # nothing is lost


# ------------------------------------------------------------------------------------- a full disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a search, started in another folder with paths as seen from there."""
    folder = tmp_path_factory.mktemp("finished")
    given = [word.replace(f"{folder}/", "") for word in flags(folder)]
    given += ["--executor=in-process", "--scheduler=none", "--trials=2", "--confirm=0"]
    with chdir(folder):
        assert cli.main([*given, "--steps=4", "--out=run"]) == 0
    return folder / "run"


MADE = {"trials.csv", "history.csv", "importance.csv", "best.yaml", "summary.txt", "report.html"}


@pytest.mark.parametrize(
    ("room", "lost"),
    [
        (100_000, {"report.html"}),
        (0, {"prompts", *MADE}),
    ],
)
def test_a_full_disk_takes_no_answer_and_each_lost_file_is_named(
    room: int, lost: set[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk with that much room: the kernel lets no file grow beyond it."""
    run = RunDir(shutil.copytree(finished, tmp_path / "run"))
    for name in MADE:
        (run.path / name).unlink(missing_ok=True)
    shutil.rmtree(run.prompts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        assert cli.show_results(run) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    said = capsys.readouterr()
    assert "the documented default has finished. It reaches loss" in " ".join(said.out.split())
    named = re.findall(r"^could not be written: (\S+): .*File too large", said.err, re.MULTILINE)
    assert sorted(named) == sorted(lost)
    assert "Traceback" not in said.err
    there = {p.relative_to(run.path).parts[0] for p in run.path.rglob("*") if p.is_file()}
    assert not there & lost
    assert {"prompts", *MADE} - {"importance.csv"} - lost <= there
    assert not list(run.path.rglob("*.tmp"))


# ---------------------------------------------------------------------------------- another folder


def test_a_run_is_found_and_gone_on_with_from_any_folder(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunDir(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    data = finished.parent

    assert cli.main(["--resume=run", "--trials=3"]) == 0
    # A copy of the file under another name is the same data.
    shutil.copy(data / "train.csv", tmp_path / "copy.csv")
    assert cli.main(["--resume=run", "--trials=3", "--train=copy.csv"]) == 0
    (tmp_path / "copy.csv").write_text((data / "train.csv").read_text() + "one more,bird\n")
    assert cli.main(["--resume=run", "--trials=4", "--train=copy.csv"]) == 2
    assert "the data have changed since the run started" in capsys.readouterr().err
    assert load(run).trials["status"].tolist() == ["finished"] * 3

    assert apply.main(["run", "--evaluate", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("test: loss ")
    assert said.err == ""
    assert training.main(["--config=run/best.yaml", "--out=again", "--quiet"]) == 0
