"""Files into texts and labels: csv, tsv, jsonl, parquet and plain text, by path or URL.

Everything here raises `ConfigError` with all that is wrong with the one file.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tune_app.run.search_config import ConfigError, did_you_mean
from tune_app.tasks.base import Labels

# Column names that data sets for text commonly use; a single one of them is taken unasked.
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "docstring", "comment")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "sentiment", "package")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zip", ".zst"}
_QUOTED = r'"(?:[^"]|"")*"'


@dataclass(frozen=True)
class Texts:
    """One file's rows. Plain text is a single row, `is_stream`: to be cut after tokenising."""

    texts: list[str]
    labels: list[str] | list[float] | None  # class names or numbers; None where none were asked for
    notes: list[str] = field(default_factory=list)
    is_stream: bool = False


def read_texts(
    path: str,
    *,
    labels: Labels,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Texts:
    """Reads one file; empty texts are dropped with a note.

    A column is a name or a number counted from 0; None looks for a usual name, then for the only
    column that it can be. Whether csv and tsv have a header is seen from their first line.
    """
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise ConfigError(
            [f"{path}: a data file ends in {', '.join(FORMATS)}, got {suffix or 'no ending'!r}"]
        )
    _check_local(path)
    name = path.rsplit("/", 1)[-1]
    if suffix == ".txt":
        if labels != "none":
            raise ConfigError([f"{path}: this task needs labels, which plain text does not have"])
        text = _load(path, suffix)
        if not text.strip():
            raise ConfigError([f"{path}: the file holds no text"])
        return Texts([text], None, is_stream=True)

    frame, notes, headless = _load(path, suffix), [], False
    if suffix in (".csv", ".tsv") and len(frame):
        headless = not _names_columns(text_column, label_column) and _is_data(frame)
        if not headless:
            frame.columns = pd.Index([str(cell) for cell in frame.iloc[0]])
            frame = frame.iloc[1:]
    frame.columns = pd.Index([str(column) for column in frame.columns])
    if not len(frame):
        raise ConfigError([f"{path}: the file holds no rows"])
    if len(set(frame.columns)) < len(frame.columns):
        raise ConfigError([f"{path}: column names must differ, got {_shown(frame.columns)}"])
    text_at, label_at, guessed = _columns(frame, path, labels != "none", text_column, label_column)
    if guessed or headless:
        label = "" if label_at is None else f", label is column {frame.columns[label_at]!r}"
        header = "no header, for its first line looks like data; " if headless else ""
        notes.append(f"{name}: {header}text is column {frame.columns[text_at]!r}{label}")
    return _clean(frame, path, text_at, label_at, labels, notes)


def class_order(names: set[str]) -> tuple[str, ...]:
    """Class names by index: as numbers where all of them are, else alphabetically."""
    try:
        return tuple(sorted(sorted(names), key=float))  # "1" and "1.0" too in a fixed order
    except ValueError:
        return tuple(sorted(names))


def _suffix(path: str) -> str:
    suffixes = Path(path.split("?")[0] if "://" in path else path).suffixes
    if suffixes and suffixes[-1].lower() in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else ""


def _check_local(path: str) -> None:
    if "://" in path:
        return  # only opening it can tell
    file = Path(path).expanduser()
    if not file.exists():
        near = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigError([f"{path}: no such file.{did_you_mean(file.name, near)}"])
    if not file.is_file():
        raise ConfigError([f"{path}: is a folder; give the data file itself"])
    if file.stat().st_size == 0:
        raise ConfigError([f"{path}: the file is empty"])


def _load(path: str, suffix: str) -> Any:
    """The file's text, or its table; csv and tsv with all cells as str and no header taken."""
    try:
        if suffix == ".txt":
            import fsspec  # type: ignore[import-untyped]  # what pandas itself opens URLs with

            local = path if "://" in path else str(Path(path).expanduser())
            with fsspec.open(local, "rt", encoding="utf-8-sig", compression="infer") as file:
                return file.read()
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix == ".jsonl":
            return pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        # "NA" and "null" are words, not missing values
        options: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
        if suffix == ".csv":
            return pd.read_csv(path, **options)
        return _unquoted(pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, **options))
    except Exception as error:  # a URL's file system may raise whatever it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError([f"{path}: cannot be read as {suffix[1:]}: {reason}"]) from error


def _unquoted(frame: pd.DataFrame) -> pd.DataFrame:
    """Takes quotes off where they quote whole fields throughout; stray quotes in text stay."""
    for column in frame:
        cells = frame[column]
        opened = cells.str.startswith('"').fillna(False).astype(bool)
        if opened.any() and cells[opened].str.fullmatch(_QUOTED).all():
            frame.loc[opened, column] = cells[opened].str[1:-1].str.replace('""', '"')
    return frame


def _names_columns(*columns: str | None) -> bool:
    return any(column is not None and not column.isdigit() for column in columns)


def _is_data(frame: pd.DataFrame) -> bool:
    """Whether the first line is a row: it holds no usual column name, but a number, long text,
    an empty cell or a value that its column repeats."""
    first = [str(cell).strip() for cell in frame.iloc[0]]
    if {cell.lower() for cell in first} & {*TEXT_NAMES, *LABEL_NAMES}:
        return False
    return any(
        re.fullmatch(r"[-+]?\d+(\.\d+)?", cell) or len(cell.split()) > 3 or not cell
        for cell in first
    ) or any((frame.iloc[1:, i] == frame.iloc[0, i]).any() for i in range(len(first)))


def _columns(
    frame: pd.DataFrame, path: str, labelled: bool, text: str | None, label: str | None
) -> tuple[int, int | None, bool]:
    """Positions of the text and the label column, and whether one was guessed by its content."""
    columns, mistakes = list(frame.columns), []

    def find(flag: str, given: str | None, usual: tuple[str, ...]) -> int | None:
        if given is None:
            known = [i for i, column in enumerate(columns) if column.strip().lower() in usual]
            return known[0] if len(known) == 1 else None
        if given in columns:
            return columns.index(given)
        if given.isdigit() and int(given) < len(columns):
            return int(given)
        mistakes.append(
            f"{path}: no column for {flag} {given!r}; {_shown(columns)}."
            f"{did_you_mean(given, columns)}"
        )
        return None

    text_at = find("--text-column", text, TEXT_NAMES)
    label_at = find("--label-column", label, LABEL_NAMES) if labelled else None
    if mistakes:
        raise ConfigError(mistakes)
    guessed = text_at is None or (labelled and label_at is None)
    if text_at is None:  # the wordiest column, where no more columns than needed are there
        free = [i for i in range(len(columns)) if i != label_at]
        if len(columns) <= 2 and free:
            text_at = max(free, key=lambda i: frame.iloc[:, i].astype(str).str.len().mean())
    if labelled and label_at is None and len(columns) == 2 and text_at is not None:
        label_at = 1 - text_at
    if text_at is None:
        mistakes.append(f"{path}: give --text-column: {_shown(columns)}")
    if labelled and label_at is None:
        mistakes.append(f"{path}: give --label-column: {_shown(columns)}")
    if labelled and text_at is not None and text_at == label_at:
        mistakes.append(f"{path}: text and label are both column {columns[text_at]!r}")
    if mistakes or text_at is None:
        raise ConfigError(mistakes)
    return text_at, label_at, guessed


def _clean(
    frame: pd.DataFrame,
    path: str,
    text_at: int,
    label_at: int | None,
    labels: Labels,
    notes: list[str],
) -> Texts:
    mistakes = []
    texts = frame.iloc[:, text_at]
    if texts.isna().any():
        mistakes.append(f"{path}: the text is missing in {_rows(texts.isna())}")
    elif other := [cell for cell in texts if not isinstance(cell, str)]:
        mistakes.append(
            f"{path}: column {frame.columns[text_at]!r} must hold text, "
            f"got {other[0]}; {_shown(frame.columns)}"
        )
    names = None
    if label_at is not None:
        names = frame.iloc[:, label_at].map(_class_name, na_action="ignore")
        missing = names.isna() | (names == "")
        if missing.any():
            mistakes.append(f"{path}: the label is missing in {_rows(missing)}")
        elif labels == "numbers":
            numbers = pd.to_numeric(names, errors="coerce").astype(float)
            strange = ~np.isfinite(numbers)
            if strange.any():
                mistakes.append(
                    f"{path}: the label must be a number, got {names[strange].iloc[0]!r} in "
                    f"{_rows(strange)}"
                )
            names = numbers
    if mistakes:
        raise ConfigError(mistakes)
    full = texts.str.strip() != ""
    if not full.all():
        notes.append(f"{path.rsplit('/', 1)[-1]}: {(~full).sum()} empty texts were dropped")
    if not full.any():
        raise ConfigError([f"{path}: all texts are empty"])
    return Texts(list(texts[full]), None if names is None else list(names[full]), notes)


def _class_name(label: object) -> str:
    """1 and 1.0 are one class: pandas turns a column of ints into floats at the slightest cause."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _rows(missing: pd.Series) -> str:
    numbers = [i + 1 for i, is_missing in enumerate(missing) if is_missing]
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"rows {', '.join(map(str, numbers[:10]))}{more} (the first row of data is 1)"


def _shown(columns: Any) -> str:
    names = [repr(c if len(c) <= 30 else c[:27] + "...") for c in columns]
    more = ", ..." if len(names) > 12 else ""
    return f"the columns are {', '.join(names[:12])}{more} (or 0 to {len(names) - 1} by number)"
