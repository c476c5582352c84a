"""Real text from the Python installation itself, so that the default run downloads nothing.

Two collections:

- docstrings of the standard library, each with the package it comes from (classification, and the
  text that the demo model was pretrained on);
- the topics of the Python language reference (`pydoc_data.topics`), for causal language modelling.

A text's split follows from its hash, so it never depends on the order of files, and the demo
model's pretraining never saw a text of the validation or test split.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

SPLITS = ("train", "valid", "test")

# The eight packages with the most docstrings among those that every build of Python has
# (tkinter and idlelib are separate packages in some distributions, distutils left in 3.12).
PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# The fields of nodes that contain statements, in the order of every node that has them.
_INNER = ("body", "handlers", "orelse", "finalbody", "cases")
_MIN_CHARS = 20  # "Close the file." does not reveal its package


def split_of(text: str) -> str:
    """The split ("train", "valid" or "test": 80, 10 and 10 %) that a text belongs to."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return {8: "valid", 9: "test"}.get(bucket, "train")


def stdlib_docstrings(packages: tuple[str, ...] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (docstring, package) over the standard library, each docstring once.

    A docstring that appears in several places counts for the first. White space is folded, because
    copies with different line breaks would otherwise end up in different splits.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    if packages is None:
        files = sorted(stdlib.rglob("*.py"))
    else:
        files = [file for package in packages for file in sorted((stdlib / package).rglob("*.py"))]
    seen = set()
    for file in files:
        parts = file.relative_to(stdlib).with_suffix("").parts
        if parts[0] == "site-packages" or {"test", "tests", "idle_test"} & set(parts):
            continue
        try:
            tree = _parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 has deliberately broken files
        for node in _documented(tree):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= _MIN_CHARS and text not in seen:
                seen.add(text)
                yield text, parts[0]


def _documented(tree: ast.Module) -> Iterator[_Documented]:
    """What may have a docstring, in the order of `ast.walk`, which would also visit expressions:
    nine nodes of ten."""
    nodes = deque[ast.AST]([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, _Documented):
            yield node
        for name in _INNER:
            nodes.extend(getattr(node, name, ()))


def _parse(source: str) -> ast.Module:
    """`ast.parse`, again where CPython 3.11 has mixed up the depths of two threads that parse at
    once (SystemError: "AST constructor recursion depth mismatch"; python/cpython#106905)."""
    for _ in range(10):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def language_reference() -> Iterator[str]:
    """Yields the paragraphs of the Python language reference as installed with the interpreter."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= _MIN_CHARS:
                yield text


@cache
def _of_the_packages() -> tuple[tuple[str, str], ...]:
    """Parsed once (1 s): a process may read them for several searches and trials."""
    return tuple(stdlib_docstrings(PACKAGES))


def docstring_packages() -> dict[str, tuple[list[str], list[str]]]:
    """Classification: by split, (docstrings, names of their packages)."""
    splits: dict[str, tuple[list[str], list[str]]] = {split: ([], []) for split in SPLITS}
    for text, package in _of_the_packages():
        texts, packages = splits[split_of(text)]
        texts.append(text)
        packages.append(package)
    return splits


def language_reference_splits() -> dict[str, list[str]]:
    """Causal language modelling: by split, paragraphs of the language reference, each once."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in dict.fromkeys(language_reference()):
        splits[split_of(text)].append(text)
    return splits
