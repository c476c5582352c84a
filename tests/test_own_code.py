"""A run that somebody else began executes nothing until its code is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_app.run.flags import parse_search_args
from tune_app.run.own_code import code_named, is_own, sign
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search.checks import check_everything
from tune_app.search.cli import main
from tune_app.study.yaml_space import load_space

CODE = """
from pathlib import Path
Path({canary!r}).touch()
def space(trial):
    trial.suggest_float("lr", 1e-4, 1e-1)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def code(tmp_path: Path, canary: Path) -> Path:
    file = tmp_path / "their_space.py"
    file.write_text(CODE.format(canary=str(canary)))
    return file


@pytest.fixture
def run(tmp_path: Path, code: Path, canary: Path) -> RunDir:
    """As a search with the space leaves it, without its signature."""
    run = RunDir(tmp_path / "run")
    run.write_atomic(run.search_yaml, SearchConfig(backbone="local", space=str(code)).to_yaml())
    run.write_atomic(run.space_yaml, load_space(str(code)).text)
    run.write_atomic(run.events_jsonl, "")
    canary.unlink()
    return run


def checked(run: RunDir, *more: str) -> None:
    check_everything(parse_search_args(["--resume", str(run.path), "--quiet", *more]))


def test_code_has_to_be_named_before_it_is_executed(
    run: RunDir, code: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(run.path)]) == 2
    assert f"If you trust it, add --space {code}." in capsys.readouterr().err
    assert not canary.exists()

    checked(run, "--space", str(code))


def test_a_config_file_does_not_name_it(run: RunDir, code: Path, tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text(f"space: {code}\n")
    with pytest.raises(ConfigError, match="If you trust it"):
        checked(run, "--config", str(tmp_path / "best.yaml"))


def test_ones_own_run_is_resumed_as_it_is(run: RunDir, code: Path) -> None:
    sign(run, str(code_named(str(code))))
    checked(run)


@pytest.mark.parametrize("space", ["default", "{mine}"])
def test_what_the_copy_of_the_space_names_counts_too(
    space: str, run: RunDir, canary: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(CODE.format(canary=str(tmp_path / "other")))
    space = space.format(mine=mine)
    config = SearchConfig(backbone="local", space=space)
    run.write_atomic(run.search_yaml, config.to_yaml())
    with pytest.raises(ConfigError, match=r"their_space\.py:space, which would be executed"):
        checked(run, "--space", space)
    assert not canary.exists()


def test_a_signature_is_of_one_user_and_one_code(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(run, "a.py:space")
    assert is_own(run, "a.py:space")
    assert not is_own(run, "b.py:space")
    assert (tmp_path / "home" / "tune_app" / "key").stat().st_mode & 0o77 == 0

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other-home"))
    assert not is_own(run, "a.py:space")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/no-home")
    sign(run, "a.py:space")
    assert not is_own(run, "a.py:space")


def test_which_values_name_code() -> None:
    assert code_named("/a/b.py") == "/a/b.py:space"
    assert code_named("/a/b.py:mine") == "/a/b.py:mine"
    assert code_named("package.module:mine") == "package.module:mine"
    assert code_named("default") is None
    assert code_named("/a/b.yaml") is None
