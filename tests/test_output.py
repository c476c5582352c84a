"""Where a command's output goes: a C locale, a reader that leaves, a closed stream, a folder whose
name has spaces."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pages import ROOT
from shell import shell
from synthetic_runs import write_run

from tune_app.report.results import load
from tune_app.report.summary import next_steps
from tune_app.report.write import write_all
from tune_app.run.run_dir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = write_run(tmp_path_factory.mktemp("runs") / "my first run", confirm_seeds=3)
    write_all(run)
    return run


def report(run: RunDir, redirected: str = "", **environment: str) -> str:
    command = f"python -m tune_app.report {shlex.quote(str(run.path))} {redirected}"
    return shell(f"set -o pipefail; {command}", ROOT, environment)


def test_a_c_locale_gets_the_same_in_ascii(run: RunDir) -> None:
    plain = report(run, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    assert plain.isascii()
    assert "?" not in plain
    assert re.search(r"difference of -0\.\d+", " ".join(plain.split()))
    assert re.search(r"\d \+/- 0\.\d", plain)
    assert "\N{MINUS SIGN}" in run.summary_txt.read_text("utf-8")


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-", "| head -n 1"])
def test_closed_streams_and_readers_that_leave_end_nothing(run: RunDir, redirected: str) -> None:
    said = report(run, f"2> {shlex.quote(str(run.path / 'errors'))} {redirected}")

    assert "Traceback" not in said
    if "2>&-" not in redirected:
        assert (run.path / "errors").read_text() == ""


def test_offered_commands_are_quoted(run: RunDir) -> None:
    commands = [line for line in next_steps(load(run)) if "python -m" in line]

    assert len(commands) == 3
    for line in commands:
        words = shlex.split(line[line.index("python") :])
        paths = [word for word in words if word.startswith("/")]
        assert paths == [str(run.best_yaml if "train" in line else run.path)]
        assert Path(paths[0]).exists()
