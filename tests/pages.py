"""The project's pages and the commands that they show, for the tests that hold them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")})
SHELLS = ("bash", "sh", "shell", "console")


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of a page's fenced blocks in these languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, continued lines joined, prompts and comments dropped."""
    lines = "\n".join(blocks(page, *SHELLS)).replace("\\\n", " ").splitlines()
    bare = [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]
    return [line for line in bare if line and not line.startswith("#")]


LINES = sorted({line for page in PAGES for line in commands(page)})


def lines_of(start: str) -> list[str]:
    """The pages' lines that begin with this, in alphabetical order."""
    return [line for line in LINES if re.match(rf"{re.escape(start)}( |$)", line)]
