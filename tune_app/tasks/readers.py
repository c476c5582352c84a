"""From a table to texts and labels: which column is what, and whether its cells can be used.

Everything here raises `ConfigError` with all that is wrong with this source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from tune_app.run.search_config import ConfigError, SearchConfig, did_you_mean
from tune_app.tasks.base import Labels
from tune_app.tasks.files import Source, load, source_name

# Column names that text data sets commonly use; if there is exactly one, it needs no flag.
TEXT_NAMES = ("text", "sentence", "content", "document", "review", "docstring", "comment")
LABEL_NAMES = ("label", "labels", "class", "target", "category", "sentiment", "package")
_PAIR, _CHAT = ("prompt", "completion"), "messages"


@dataclass(frozen=True)
class Texts:
    """One source's rows. Plain text is a single row, `is_stream`, to be cut after tokenising."""

    texts: list[str]
    labels: list[str] | list[float] | None  # class names or numbers; None if the task has none
    notes: list[str] = field(default_factory=list)
    is_stream: bool = False
    completions: list[str] | None = None  # then `texts` are their prompts
    chats: list[list[dict[str, str]]] | None = None  # role and content; then `texts` is empty
    columns: str = ""  # which column is what, in words; "" if there are none


@dataclass(frozen=True)
class Reading:
    """How to read a source: columns by name, or by number from 0; None: a column with a usual name,
    or the only possible column."""

    labels: Labels
    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    encoding: str | None = None
    delimiter: str | None = None

    @classmethod
    def of(cls, config: SearchConfig, labels: Labels) -> Reading:
        """As the flags of a search specify it."""
        return cls(
            labels=labels,
            text_column=config.text_column,
            label_column=config.label_column,
            prompt_column=config.prompt_column,
            completion_column=config.completion_column,
            encoding=config.encoding,
            delimiter=config.delimiter,
        )


def read_texts(source: Source, reading: Reading, *, keep_empty: bool = False) -> Texts:
    """Reads one file or table; empty texts are dropped with a note, unless `keep_empty`.

    Whether csv and tsv files have a header is guessed from their first line.
    """
    labelled = reading.labels != "none"
    loaded = load(source, encoding=reading.encoding, delimiter=reading.delimiter)
    name = source_name(source)
    if isinstance(loaded, str):
        if labelled:
            raise ConfigError([f"{name}: this task needs labels, which plain text does not have"])
        if not loaded.strip():
            raise ConfigError([f"{name}: the file has no text"])
        return Texts([loaded], None, is_stream=True)

    table, notes, headless = loaded.data, list(loaded.notes), False
    if loaded.raw and len(table):
        named = _names_columns(
            *(reading.text_column, reading.label_column),
            *(reading.prompt_column, reading.completion_column),
        )
        header, sure = (True, True) if named else _has_header(table)
        headless = not header
        if header:
            table.columns = pd.Index([str(cell) for cell in table.iloc[0]])
            table = table.iloc[1:]
        if header and not sure:
            notes.append(
                f"{loaded.name}: the first line is used as column names, because column "
                f"{_told_by(table)!r} repeats its values but never this one"
            )
    table.columns = pd.Index([str(column) for column in table.columns])
    if not len(table):
        raise ConfigError([f"{name}: the file has no rows"])
    if len(set(table.columns)) < len(table.columns):
        raise ConfigError([f"{name}: column names must differ, got {_shown(table.columns)}"])
    if not labelled and (taught := _with_completions(table, name, reading)) is not None:
        return replace(taught, notes=notes + taught.notes)
    text_at, label_at, guessed = _columns(table, name, reading)
    label = "" if label_at is None else f", label is column {table.columns[label_at]!r}"
    columns = f"text is column {table.columns[text_at]!r}{label}"
    if guessed or headless:
        no_header = "no header, because the first line looks like data; " if headless else ""
        notes.append(f"{loaded.name}: {no_header}{columns}")
    texts = _clean(table, name, text_at, label_at, reading.labels, keep_empty)
    return Texts(texts.texts, texts.labels, notes + texts.notes, columns=columns)


def class_order(names: set[str]) -> tuple[str, ...]:
    """Class names by index: ordered as numbers if all of them are, else alphabetically."""
    try:
        return tuple(sorted(sorted(names), key=float))
    except ValueError:
        return tuple(sorted(names))


def class_name(label: object) -> str:
    """1, 1.0 and "1.0" are one class: pandas turns columns of ints into floats at the slightest
    provocation, and so do tools that write csv."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    name = str(label).strip()
    return re.sub(r"\.0*", "", name) if re.fullmatch(r"[-+]?\d+\.0*", name) else name


def _names_columns(*columns: str | None) -> bool:
    return any(column is not None and not column.isdigit() for column in columns)


def _has_header(table: pd.DataFrame) -> tuple[bool, bool]:
    """(whether the first line is a header, whether that is certain).

    It is one if it has a usual name, or an empty first cell before names, as `to_csv` writes above
    its index. It is a row if it has a number, another empty cell, or a value that its column
    repeats. So it is if it has a long text, unless some column repeats its values but never this
    one.
    """
    first = [str(cell).strip() for cell in table.iloc[0]]
    if {cell.lower() for cell in first} & {*TEXT_NAMES, *LABEL_NAMES, *_PAIR, _CHAT}:
        return True, True
    names = first[1:] if len(first) > 1 and not first[0] else first
    if any(not cell or re.fullmatch(r"[-+]?\d+(\.\d+)?", cell) for cell in names):
        return False, True
    if any((table.iloc[1:, i] == table.iloc[0, i]).any() for i in range(len(first))):
        return False, True
    if len(names) < len(first) or all(len(cell.split()) <= 3 for cell in first):
        return True, True
    return _told_by(table.iloc[1:].set_axis(first, axis=1)) is not None, False


def _told_by(table: pd.DataFrame) -> str | None:
    """The name of the first column that repeats its values; None if none does."""
    for i, name in enumerate(table.columns):
        if 2 * table.iloc[:, i].nunique() <= len(table):
            return str(name)
    return None


def _columns(table: pd.DataFrame, path: str, reading: Reading) -> tuple[int, int | None, bool]:
    """Positions of the text and the label column, and whether one was guessed from its content."""
    columns, mistakes, labelled = list(table.columns), list[str](), reading.labels != "none"

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

    text_at = find("--text-column", reading.text_column, TEXT_NAMES)
    label_at = find("--label-column", reading.label_column, LABEL_NAMES) if labelled else None
    if mistakes:
        raise ConfigError(mistakes)
    guessed = text_at is None or (labelled and label_at is None)
    # An index as pandas writes it is neither.
    likely = [i for i, column in enumerate(columns) if column.strip() and column != "Unnamed: 0"]
    if text_at is None:  # the wordiest column, if there are no more columns than needed
        free = [i for i in likely if i != label_at]
        if len(likely) <= 2 and free:
            text_at = max(free, key=lambda i: table.iloc[:, i].astype(str).str.len().mean())
    if labelled and label_at is None and len(likely) == 2 and text_at in likely:
        label_at = next(i for i in likely if i != text_at)
    if text_at is None:
        mistakes.append(f"{path}: give --text-column: {_shown(columns)}")
    if labelled and label_at is None:
        mistakes.append(f"{path}: give --label-column: {_shown(columns)}")
    if labelled and text_at is not None and text_at == label_at:
        mistakes.append(f"{path}: text and label are both column {columns[text_at]!r}")
    if mistakes or text_at is None:
        raise ConfigError(mistakes)
    return text_at, label_at, guessed


def _with_completions(table: pd.DataFrame, path: str, reading: Reading) -> Texts | None:
    """Prompts with completions, or chats, if there are such columns; None otherwise."""
    given = (reading.prompt_column, reading.completion_column)
    columns = {column.strip().lower(): i for i, column in enumerate(table.columns)}
    if given == (None, None):
        if reading.text_column is not None or {*TEXT_NAMES} & columns.keys():
            return None
        if _CHAT in columns:
            return _chats(table.iloc[:, columns[_CHAT]], path)
        if not {*_PAIR} <= columns.keys():
            return None
        places = [columns[name] for name in _PAIR]
    else:
        places, mistakes = [], []
        for flag, name in zip(("--prompt-column", "--completion-column"), given, strict=True):
            if name in list(table.columns):
                places.append(list(table.columns).index(str(name)))
            elif name is not None and name.isdigit() and int(name) < len(table.columns):
                places.append(int(name))
            else:
                mistakes.append(f"{path}: no column for {flag} {name!r}; {_shown(table.columns)}")
        if mistakes:
            raise ConfigError(mistakes)
    prompts, completions = (table.iloc[:, place] for place in places)
    mistakes = [
        f"{path}: column {cells.name!r} must be text; it is not in {_rows(strange)}"
        for cells in (prompts, completions)
        if (strange := ~cells.map(lambda cell: isinstance(cell, str))).any()
    ]
    if mistakes:
        raise ConfigError(mistakes)
    full = (prompts.str.strip() != "") & (completions.str.strip() != "")
    notes = []
    if not full.all():
        name = path.rsplit("/", 1)[-1]
        notes.append(f"{name}: {(~full).sum()} rows without prompt or completion were dropped")
    if not full.any():
        raise ConfigError(f"{path}: no row has a prompt and a completion")
    said = f"prompt is column {prompts.name!r}, completion is column {completions.name!r}"
    return Texts(
        list(prompts[full]), None, notes, completions=list(completions[full]), columns=said
    )


def _chats(cells: pd.Series, path: str) -> Texts:
    """Messages with role and content, the last one the assistant's."""

    def is_chat(cell: object) -> bool:
        if not isinstance(cell, list | tuple | np.ndarray) or len(cell) < 2:
            return False
        whole = all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in cell
        )
        return whole and cell[-1]["role"] == "assistant" and bool(cell[-1]["content"].strip())

    strange = ~cells.map(is_chat).astype(bool)
    if strange.any():
        raise ConfigError(
            f"{path}: {cells.name!r} must be a list of messages with role and content, the last "
            f"one the assistant's; it is not in {_rows(strange)}"
        )
    chats = [[{k: m[k] for k in ("role", "content")} for m in cell] for cell in cells]
    return Texts([], None, chats=chats, columns=f"chats are column {cells.name!r}")


def _clean(
    table: pd.DataFrame,
    path: str,
    text_at: int,
    label_at: int | None,
    labels: Labels,
    keep_empty: bool,
) -> Texts:
    mistakes, notes = list[str](), list[str]()
    texts = table.iloc[:, text_at]
    if texts.isna().any():
        mistakes.append(f"{path}: the text is missing in {_rows(texts.isna())}")
    elif other := [cell for cell in texts if not isinstance(cell, str)]:
        mistakes.append(
            f"{path}: column {table.columns[text_at]!r} must be text, "
            f"got {other[0]}; {_shown(table.columns)}"
        )
    values = None
    if label_at is not None:
        values, wrong = _labels(table.iloc[:, label_at], labels)
        mistakes += [f"{path}: {message}" for message in wrong]
    if mistakes:
        raise ConfigError(mistakes)
    full = texts.str.strip() != ""
    if keep_empty:
        full[:] = True
    if not full.all():
        notes.append(f"{path.rsplit('/', 1)[-1]}: {(~full).sum()} empty texts were dropped")
    if not full.any():
        raise ConfigError([f"{path}: all texts are empty"])
    return Texts(list(texts[full]), None if values is None else list(values[full]), notes)


def _labels(cells: pd.Series, labels: Labels) -> tuple[pd.Series, list[str]]:
    """The labels as class names or numbers, and what is wrong with them."""
    several = cells.map(lambda cell: isinstance(cell, list | tuple | dict | set | np.ndarray))
    if several.any():
        return cells, [
            f"the label is a list or an object in {_rows(several)}, such as "
            f"{cells[several].iloc[0]!r}; a row must have one label: choose one, join them into "
            "one name, or make a separate file for each question"
        ]
    names = cells.map(class_name, na_action="ignore")
    missing = names.isna() | (names == "")
    if missing.any():
        return names, [f"the label is missing in {_rows(missing)}"]
    if labels != "numbers":
        return names, []
    numbers = pd.to_numeric(names, errors="coerce").astype(float)
    strange = ~np.isfinite(numbers)
    if strange.any():
        got = names[strange].iloc[0]
        return numbers, [f"the label must be a number, got {got!r} in {_rows(strange)}"]
    return numbers, []


def _rows(which: pd.Series) -> str:
    numbers = [i + 1 for i, is_meant in enumerate(which) if is_meant]
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"rows {', '.join(map(str, numbers[:10]))}{more} (the first row of data is 1)"


def _shown(columns: Any) -> str:
    names = [repr(c if len(c) <= 30 else c[:27] + "...") for c in columns]
    more = ", ..." if len(names) > 12 else ""
    return f"the columns are {', '.join(names[:12])}{more} (or 0 to {len(names) - 1} by number)"
