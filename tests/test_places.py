"""Machines where the usual places will not do: a long TMPDIR, a home that cannot be written, a
folder that is nobody's, a study that another process holds."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search import cli
from tune_app.search.ray_tune.places import ways_round
from tune_app.study import storage


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


def test_rays_token_has_a_place_where_home_cannot_be_written(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("HOME", "/proc")  # nobody writes there, not even root

    token = Path(ways_round()["RAY_AUTH_TOKEN_PATH"])

    assert len(token.read_text()) == 32
    assert token.stat().st_mode & 0o077 == 0


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
    assert "held by another process" in said
    assert "Traceback" not in said
    holder.rollback()
    assert study.ask().number == 0  # nothing is lost
