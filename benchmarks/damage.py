"""Damaged contents of files, for `benchmarks.fuzz`: bytes, values and structure of each format."""

from __future__ import annotations

import json
import os
import pickle
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml


class Bomb:
    """Pickled, it is a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.file),)


def odd_values(canary: Path) -> list[Any]:
    call = f"!!python/object/apply:os.mkdir ['{canary}']"
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    html = "</script><script>alert(1)</script>"
    return [
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320,
        float("nan"), float("inf"), "", " ", "a", "1", "nan", "\0", "\ud800", "\u2028", "x" * 10**5,
        [], {}, [[]], [None], {"": None}, [1, "a", None], {"lr": {"lr": {}}}, "../../etc/passwd",
        "/dev/zero", call, template, html, "%s%n", "1e-2",
    ]  # fmt: skip


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four small changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice([1, 2, 8, 64, 1024]))
        kind = rng.randrange(6)
        if kind == 0:
            data[at:to] = b""
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 32]))
        elif kind == 2:
            data[at:to] = bytes(to - at)
        elif kind == 3:
            data[at:at] = data[at:to] * rng.choice([1, 2, 50])
        elif kind == 4 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 5:
            del data[at:]
    return bytes(data)


def change_value(document: Any, rng: random.Random, odd: Sequence[Any]) -> Any:
    """The document with one to three of its values, names or items changed."""
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return rng.choice(odd)
        inside, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(["", "lr", "__class__", "event", "x" * 1000])] = inside.pop(key)
        elif kind == 2:
            inside[key] = [inside[key]] if rng.random() < 0.5 else {"value": inside[key]}
        elif kind == 3 and isinstance(inside, list):
            inside.insert(rng.randrange(len(inside) + 1), inside[key])
        else:
            inside[key] = rng.choice(odd)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _json(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _yaml(document: Any) -> bytes:
    text = yaml.safe_dump(document, sort_keys=False)
    return text.replace("'!!python", "!!python").encode("utf-8", "surrogatepass")  # now it is a tag


class Changes:
    """Changed contents of a file of some format.

    canary: what exists once anything of them was executed
    """

    def __init__(self, canary: Path, rng: random.Random) -> None:
        self.canary, self.rng, self.odd = canary, rng, odd_values(canary)

    def _bytes_or(self, content: bytes, structured: Callable[[], bytes]) -> bytes:
        if self.rng.random() < 0.4:
            return change_bytes(content, self.rng)
        try:
            return structured()
        except (
            RecursionError,
            ValueError,
            TypeError,
            OverflowError,
            yaml.YAMLError,
            sqlite3.Error,
        ):
            # Not to be written so.
            return change_bytes(content, self.rng)

    def json(self, content: bytes) -> bytes:
        return self._bytes_or(
            content, lambda: _json(change_value(json.loads(content), self.rng, self.odd))
        )

    def yaml(self, content: bytes) -> bytes:
        return self._bytes_or(
            content, lambda: _yaml(change_value(yaml.safe_load(content), self.rng, self.odd))
        )

    def lines(self, content: bytes) -> bytes:
        def structured() -> bytes:
            lines = content.splitlines(keepends=True)
            for _ in range(self.rng.randint(1, 3)):
                at = self.rng.randrange(len(lines))
                event = change_value(json.loads(lines[at]), self.rng, self.odd)
                lines[at] = _json(event) + b"\n"
            if self.rng.random() < 0.2:
                self.rng.shuffle(lines)
            return b"".join(lines)

        return self._bytes_or(content, structured)

    def safetensors(self, content: bytes) -> bytes:
        def structured() -> bytes:
            length = int.from_bytes(content[:8], "little")
            document = json.loads(content[8 : 8 + length])
            header = _json(change_value(document, self.rng, self.odd))
            told = len(header) if self.rng.random() < 0.8 else self.rng.choice([0, 7, 2**40, 2**63])
            return told.to_bytes(8, "little") + header + content[8 + length :]

        return self._bytes_or(content, structured)

    def pickle(self, content: bytes) -> bytes:
        if self.rng.random() < 0.1:
            return pickle.dumps(Bomb(self.canary))
        return change_bytes(content, self.rng)

    def sqlite(self, content: bytes) -> bytes:
        def structured() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "changed.db")
                file.write_bytes(content)
                with closing(sqlite3.connect(file)) as database:
                    for _ in range(self.rng.randint(1, 3)):
                        self._change_row(database)
                    database.commit()
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                return file.read_bytes()

        return self._bytes_or(content, structured)

    def _change_row(self, database: sqlite3.Connection) -> None:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        table = self.rng.choice([name for (name,) in names])
        rows = database.execute(f"SELECT rowid, * FROM {table}")
        columns, found = [about[0] for about in rows.description], rows.fetchall()
        if not found:
            return
        row, at = self.rng.choice(found), self.rng.randrange(1, len(columns))
        if self.rng.random() < 0.1:
            database.execute(f"DELETE FROM {table} WHERE rowid = ?", row[:1])
            return
        value = self.rng.choice(self.odd)
        if columns[at].endswith("_json") and self.rng.random() < 0.8:
            changed = change_value([json.loads(row[at])], self.rng, self.odd)
            value = "".join(_json(part).decode() for part in changed[:1])
        elif isinstance(value, list | dict):
            value = _json(value).decode()
        database.execute(f"UPDATE {table} SET {columns[at]} = ? WHERE rowid = ?", (value, row[0]))
