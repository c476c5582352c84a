"""Every command in the pages is run, or its flags are parsed; one that is unknown is a mistake."""

from __future__ import annotations

import importlib.util
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pages import PAGES, ROOT, SHELLS, blocks, commands
from synthetic_runs import write_run
from trained import train_run, write_rows

from tune_app import apply, report, search, train
from tune_app.flags import parse_search_args
from tune_app.results import write_tables
from tune_app.run_dir import RunDir

COMMANDS = sorted({(page.name, line) for page in PAGES for line in commands(page)})
LINES = sorted({line for _, line in COMMANDS})
# What needs a network, an empty machine or a shell of its own: page -> how its lines may begin.
BY_HAND = {
    "install.md": r"python3\.11 -m venv |\.venv/bin/pip install |uv (sync|run|venv|pip) ?",
    "your-swarm.md": r"petals_server\(\) \{|HIVEMIND_LOGLEVEL=INFO python -c |\}$|COMMON=",
    "watching.md": r"\.venv/bin/ray |curl -H |pip install |optuna-dashboard |tensorboard "
    r"|mlflow server |wandb (login|sync)|export WANDB_MODE=",
}
CHECKED = r"make [a-z]+|python -m tune_app\.(search|train|apply|report|private_swarm)( |$)"
CHECKED += r"|petals_server |ray (start|get-auth-token)"


def of(start: str) -> list[str]:
    """The lines that begin with this."""
    return [line for line in LINES if re.match(rf"{re.escape(start)}( |$)", line)]


def arguments(line: str) -> list[str]:
    """What follows the command's name, without what a shell redirects."""
    words = shlex.split(line.partition(" < ")[0])
    return words[words.index("-m") + 2 :] if "-m" in words else words[1:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the pages name."""
    for name in ("reviews", "a", "b"):
        run = write_run(tmp_path / "runs" / name, confirm_seeds=2)
        write_tables(RunDir(run.path))
    write_rows(tmp_path / "reviews.csv", 0, 30)
    page = ROOT / "docs" / "your-space.md"
    (tmp_path / "my_space.yaml").write_text(blocks(page, "yaml")[0])
    (tmp_path / "my_space.py").write_text(blocks(page, "python")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_known(page: str, line: str) -> None:
    assert re.match(CHECKED, line) or re.match(BY_HAND.get(page, "never"), line), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_shell(page: Path) -> None:
    for block in blocks(page, *SHELLS):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("line", of("python -m tune_app.search"))
def test_flags_of_a_search_are_right(folder: Path, line: str, capsys) -> None:
    given = arguments(line)
    if "--help" in given:
        with pytest.raises(SystemExit, match="0"):
            parse_search_args(given)
    elif "--dry-run" in given:
        assert search.main(given) == 0, capsys.readouterr().err
        assert "Nothing has been started." in capsys.readouterr().out
    else:
        parse_search_args(given)


@pytest.mark.parametrize("line", of("python -m tune_app.train"))
def test_flags_of_train_are_right(folder: Path, line: str) -> None:
    _, trial = train.parse_train_args(arguments(line))
    assert not trial.check()


@pytest.mark.parametrize("line", of("python -m tune_app.report"))
def test_report_commands_run(folder: Path, line: str, capsys) -> None:
    assert report.main(arguments(line)) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the run, on a tiny model, that the pages apply."""
    folder = tmp_path_factory.mktemp("docs")
    train_run(folder).rename(folder / "reviews")
    (folder / "runs").mkdir()
    (folder / "reviews").rename(folder / "runs" / "reviews")
    for name in ("reviews-2025.csv", "more.csv"):
        write_rows(folder / name, 300, 6)
    (folder / "lines.txt").write_text("wing nest\nroot bark\n")
    return folder


@pytest.mark.parametrize("line", of("python -m tune_app.apply"))
def test_apply_commands_run(trained: Path, line: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(trained)
    with open(line.partition(" < ")[2] or "lines.txt") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert apply.main(arguments(line)) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.swarm
@pytest.mark.parametrize("line", of("python -m tune_app.private_swarm"))
def test_private_swarm_commands_start_and_stop(line: str) -> None:
    given = arguments(line)
    words = ["--servers", "1", "--device", "cpu", "--replicas", "1"]
    told = [word for word in given if word.startswith("--")]
    assert set(told) <= set(words), told
    command = [sys.executable, "-m", "tune_app.private_swarm", "tune_app/demo/model", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            shown = ""
            deadline = time.monotonic() + 100
            while "Ctrl-C" not in shown and time.monotonic() < deadline:
                shown += process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    (search_line,) = re.findall(r"python -m tune_app\.search .*", shown)
    assert parse_search_args(arguments(search_line)).peers


@pytest.mark.parametrize("line", of("petals_server"))
def test_flags_of_petals_exist(line: str) -> None:
    page = (ROOT / "docs" / "your-swarm.md").read_text()
    (common,) = re.findall(r'COMMON="(.*)"', page)
    package = importlib.util.find_spec("petals")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "cli" / "run_server.py").read_text()
    for flag in re.findall(r"--\w+", f"{line} {common}"):
        assert re.search(rf"['\"]{flag}['\"]", source), flag


@pytest.mark.parametrize("line", of("ray start") + of("ray get-auth-token"))
def test_ray_commands_exist(line: str) -> None:
    from ray.scripts.scripts import cli

    command = cli.commands[shlex.split(line)[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[\w-]+", line)) <= options


def test_the_excerpt_of_the_readme_is_of_the_recording() -> None:
    recording = (ROOT / "docs" / "terminal.txt").read_text().splitlines()
    excerpt = next(b for b in blocks(ROOT / "README.md", "text") if b.startswith("trial"))
    for line in excerpt.splitlines():
        assert line in recording or line.strip() in ("...", ""), line


def test_readme_lists_every_module_and_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "tune_app").glob("*.py")):
        assert (
            path.stem == "__init__"
            or f"`{path.name}`" in readme
            or (f"`tune_app/{path.name}`" in readme)
        ), path.name
    for path in PAGES:
        assert path.name == "README.md" or f"docs/{path.name}" in readme, path.name
