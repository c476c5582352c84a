"""The rules that keep the rooms apart, and the promises of the files around the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, commands

PACKAGE = ROOT / "tune_app"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Where a library may be imported: a folder, or a module.
ONLY_IN = {
    "ray": ("search/ray_tune/",),
    "petals": ("backbones/swarm.py", "backbones/swarm_session.py", "serve/", "petals_compat.py"),
    "hivemind": ("backbones/swarm.py", "serve/", "petals_compat.py"),
    "mlflow": ("search/checks.py", "search/tracking.py"),
    "wandb": ("search/checks.py", "search/tracking.py"),
}
# The rooms, each with those that it may import from besides itself. A command (cli.py) puts the
# rooms together, so it may import from any; nobody imports it.
_BELOW_TRAIN = {"run", "study", "tasks", "models", "serve", "report", "backbones"}
MAY_IMPORT: dict[str, set[str]] = {
    "run": set(),
    "study": {"run"},
    "tasks": {"run"},
    "models": {"run", "tasks"},  # the demo model is pretrained on a task's text
    "serve": {"run", "study", "tasks", "models"},
    "report": {"run", "study", "tasks", "models"},
    "backbones": {"run", "study", "tasks", "models", "serve"},
    "train": _BELOW_TRAIN,
    "search": _BELOW_TRAIN | {"train"},
    "apply": _BELOW_TRAIN | {"train"},
    "api": _BELOW_TRAIN | {"train", "search", "apply"},
}
# Loaded by every trial actor, or by whoever only wants to look at results: these start fast.
LIGHT = (
    "tune_app.run.search_config",
    "tune_app.report.results",
    "tune_app.run.run_dir",
    "tune_app.study.yaml_space",
    "tune_app.search.ray_tune.trainable",
    "tune_app.train.checkpoint",
)
HEAVY = {"torch", "transformers", "petals", "hivemind"}
MAX_LINES = 400
# Paths of one machine and hosts of package indexes, in pieces so that this file has none of them.
PRIVATE = re.compile(
    "|".join([r"/roo" + r"t/", r"/tmp/" + r"\w/", r"/wor" + r"k/", r"pypi\.or" + r"g/simple"])
    + "|pythonhoste"
    + r"d\.org|find-link"
    + r"s\s*="
)


def imported_packages(source: str) -> set[str]:
    """Top-level names of all packages that a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def imported_modules(source: str) -> set[str]:
    """The modules of tune_app that a module imports, inside functions too, as a dotted path."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.partition(".")[2] for name in names if name.startswith("tune_app.")}


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_library_is_imported_only_in_its_own_room(package: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if package in imported_packages(path.read_text())
    }

    assert users
    assert sorted(user for user in users if not user.startswith(ONLY_IN[package])) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_the_rooms_above_it(module: Path) -> None:
    room = module.relative_to(PACKAGE).parts[0]
    imported = {tuple(name.split(".")) for name in imported_modules(module.read_text())}
    if module.name not in ("__main__.py", "__init__.py"):
        assert [name for name in imported if name[1:2] == ("cli",)] == []
    if (PACKAGE / room).is_dir() and module.name not in ("cli.py", "__main__.py"):
        rooms = {name[0] for name in imported} & set(MAY_IMPORT)
        assert sorted(rooms - MAY_IMPORT[room] - {room}) == []


def test_every_folder_is_a_room_with_a_rule() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()

    assert module in loaded
    assert sorted(HEAVY.intersection(loaded)) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_is_short_and_named_for_what_it_does(module: Path) -> None:
    assert module.stem not in {"utils", "util", "helpers", "common", "misc"}
    lines = module.read_text().count("\n")
    assert lines <= MAX_LINES


def test_tracked_files_name_no_machine_and_no_index() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # weights and pictures; a file deleted but not yet committed
        found += [f"{name}: {match.group()}" for match in PRIVATE.finditer(text)]

    assert found == []


def test_readme_shows_the_one_command() -> None:
    assert any(line.startswith("make search") for line in commands(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        for target in re.findall(r"(?:^|&& )make ([a-z]+)", line):
            assert target in targets, line
        for module in re.findall(r"python -m (tune_app[\w.]*)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]

        assert pins
        assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins), name
