"""Reads a file or a table in memory, as a table or as plain text; columns have no meaning here yet.

Everything here raises `ConfigError` with what is wrong with this source.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pandas as pd

from tune_app.run.paths import user_path
from tune_app.run.search_config import ConfigError, did_you_mean

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zip", ".zst"}
_QUOTED = r'"(?:[^"]|"")*"'
_HEAD_BYTES = 65_536  # from which encoding and delimiter are guessed
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@runtime_checkable
class HasToPandas(Protocol):
    """`datasets.Dataset`, Arrow tables and many others."""

    def to_pandas(self) -> Any: ...


# A path or a URL that pandas opens, or a table in memory.
Source: TypeAlias = "str | Path | pd.DataFrame | HasToPandas"


@dataclass(frozen=True)
class LoadedTable:
    """data: if `raw` (csv and tsv, all cells str), a header is still a row; name: for messages"""

    data: pd.DataFrame
    name: str
    raw: bool
    notes: list[str]


def source_name(source: Source) -> str:
    """The source's name in messages."""
    return str(source) if isinstance(source, str | Path) else "the table"


def is_table(path: str) -> bool:
    """Whether the file's extension is one of tables."""
    return _suffix(path) in FORMATS[:-1]


def keep_table(source: Source, file: Path) -> str:
    """The path or URL of `source` for a search. A table in memory is written to `file` (.parquet),
    so that every process and any later call have the same rows."""
    if isinstance(source, str | Path):
        return str(source)
    table = _as_table(source)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        table.to_parquet(file, index=False)
    except Exception as error:  # pyarrow has many of its own
        raise ConfigError(
            f"{file.stem}: the table cannot be saved as parquet, perhaps because a column has "
            f"values of different types: {' '.join(str(error).split())}"
        ) from error
    return str(file)


def _as_table(source: pd.DataFrame | HasToPandas) -> pd.DataFrame:
    table = source if isinstance(source, pd.DataFrame) else source.to_pandas()
    if not isinstance(table, pd.DataFrame):
        raise ConfigError(
            f"the data: to_pandas() of {type(source).__name__} returns {type(table).__name__}, not "
            "a DataFrame; if it has several splits, give one of them."
        )
    return table.set_axis([str(column) for column in table.columns], axis=1)


def load(
    source: Source, *, encoding: str | None = None, delimiter: str | None = None
) -> LoadedTable | str:
    """The source's table, or the text of a plain-text file.

    encoding: of text files; None: UTF-8, unless a byte order mark differs
    delimiter: of csv and tsv; None: by the extension, or the only one that splits all lines into
        equally many fields
    """
    if not isinstance(source, str | Path):
        return LoadedTable(_as_table(source), "the table", raw=False, notes=[])
    path = str(source)
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise ConfigError(
            [f"{path}: must end in {', '.join(FORMATS)}; got {suffix or 'no extension'!r}"]
        )
    _check_local(path)
    name, notes = path.rsplit("/", 1)[-1], list[str]()
    try:
        if suffix == ".parquet":
            return LoadedTable(pd.read_parquet(path), name, raw=False, notes=notes)
        text = _text(path, encoding)
        if suffix == ".txt":
            return text
        if suffix in (".jsonl", ".json"):
            return LoadedTable(_objects(path, text), name, raw=False, notes=notes)
        if delimiter is None and suffix == ".csv":
            delimiter = _delimiter(text)
            if delimiter != ",":
                notes.append(f"{name}: fields are separated by {delimiter!r}")
        delimiter = "\t" if delimiter in (None, "tab", "\\t") else delimiter
        # "NA" and "null" are words, not missing values
        options: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
        options |= {"sep": delimiter}
        if suffix == ".tsv":
            options["quoting"] = csv.QUOTE_NONE
        table = pd.read_csv(io.StringIO(text), **options)
        return LoadedTable(
            _unquoted(table) if suffix == ".tsv" else table, name, raw=True, notes=notes
        )
    except ConfigError:
        raise
    except Exception as error:  # file systems behind URLs raise many unrelated types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError([f"{path}: cannot be read as {suffix[1:]}: {reason}"]) from error


def _suffix(path: str) -> str:
    suffixes = Path(path.split("?")[0] if "://" in path else path).suffixes
    if suffixes and suffixes[-1].lower() in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else ""


def _check_local(path: str) -> None:
    if "://" in path:
        return  # only opening it can tell
    file = user_path(path)
    if not os.path.exists(file):
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigError([f"{path}: no such file.{did_you_mean(file.name, near)}"])
    if not file.is_file():
        raise ConfigError([f"{path}: is a folder; give the data file itself"])
    if file.stat().st_size == 0:
        raise ConfigError([f"{path}: the file is empty"])


def _text(path: str, encoding: str | None) -> str:
    import fsspec  # type: ignore[import-untyped]  # what pandas itself opens URLs with

    local = path if "://" in path else str(user_path(path))
    with fsspec.open(local, "rb", compression="infer") as file:
        content: bytes = file.read()
    return decoded(path, content, encoding)


def decoded(path: str, content: bytes, encoding: str | None = None) -> str:
    """The bytes of a text file as text. Raises ConfigError, which names the flag to give, if they
    are not in that encoding."""
    if encoding is None:
        marks = (mark for mark in _MARKS if content.startswith(mark))
        encoding = _MARKS.get(next(marks, b""), "utf-8")
    if not (encoding == "utf-8" and b"\0" in content[:_HEAD_BYTES]):
        try:
            return content.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeError:
            pass
        except LookupError:
            raise ConfigError(
                f"--encoding: must be a name such as utf-8, cp1252 or utf-16, got {encoding!r}."
            ) from None
    raise ConfigError(
        f"{path}: is not {encoding} text; give its --encoding: cp1252 for Western European Windows "
        "files, latin-1, utf-16-le, shift_jis, ..."
    )


def _delimiter(text: str) -> str:
    """The delimiter of a csv file: a comma, unless only another one is possible."""
    head = text[:_HEAD_BYTES]
    if len(head) < len(text):
        head = head.rpartition("\n")[0]

    def fields(delimiter: str) -> int:
        """Fields per line if all lines have equally many, else 0."""
        rows = csv.reader(io.StringIO(head), delimiter=delimiter)
        counts = {len(row) for row in rows if row}
        return counts.pop() if len(counts) == 1 else 0

    if fields(",") > 1:
        return ","
    sure = [delimiter for delimiter in ";\t|" if fields(delimiter) > 1]
    return sure[0] if len(sure) == 1 else ","


def _objects(path: str, text: str) -> pd.DataFrame:
    """A JSON array of objects, or one object per line."""
    if text.lstrip().startswith("["):
        rows, place = json.loads(text), "item {} of the array"
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        rows, place = [], "line {}"
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number == 1 and len(lines) > 1 and line.strip() == "{":
                    raise ConfigError(
                        f"{path}: has one JSON object over several lines; must be an array of "
                        "objects, one for each row, or one object per line"
                    ) from None
                raise ValueError(f"line {number}: {error}") from None
    strange = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if strange is not None:
        raise ConfigError(f"{path}: each row must be a JSON object, {place.format(strange)} is not")
    return pd.DataFrame(rows, dtype=object).infer_objects()


def _unquoted(table: pd.DataFrame) -> pd.DataFrame:
    """Removes quotes from a column if they always quote whole fields; stray quotes in text stay."""
    for column in table:
        cells = table[column]
        opened = cells.str.startswith('"').fillna(False).astype(bool)
        if opened.any() and cells[opened].str.fullmatch(_QUOTED).all():
            table.loc[opened, column] = cells[opened].str[1:-1].str.replace('""', '"')
    return table
