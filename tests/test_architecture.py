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

# Who may import what.
ONLY_IN = {
    "ray": {
        "search.py",
        "tuning.py",
        "searcher.py",
        "trainable.py",
        "host.py",
        "metrics.py",
        "cluster.py",
        "recorder.py",
        "population.py",
        "tracking.py",
    },
    "petals": {"backbones/swarm.py", "private_swarm.py", "petals_compat.py"},
    "mlflow": {"checks.py"},
    "wandb": {"checks.py"},
    "hivemind": {"backbones/swarm.py", "private_swarm.py", "petals_compat.py"},
}
# Loaded by every trial actor, or by whoever only wants to look at results: these start fast.
LIGHT = (
    "tune_app.config",
    "tune_app.results",
    "tune_app.run_dir",
    "tune_app.search_space",
    "tune_app.trainable",
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


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_library_is_imported_only_by_its_own_modules(package: str) -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if package in imported_packages(path.read_text())
    }

    assert sorted(users - ONLY_IN[package]) == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_torch(module: str) -> None:
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
