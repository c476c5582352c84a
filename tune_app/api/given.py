"""What a caller gives (settings by name, DataFrames, spaces) as what the rooms below take."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.typed import convert_fields

SPLITS = ("train", "valid", "test")


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Mistakes name the flags of the commands; in here they name the arguments of a function."""
    names = {"--" + field.name.replace("_", "-"): field.name for field in fields(SearchConfig)}

    def renamed(message: str) -> str:
        return re.sub(r"--[a-z][a-z-]*", lambda flag: names.get(flag[0], flag[0]), message)

    try:
        yield
    except ConfigError as error:
        raise ConfigError([renamed(message) for message in error.messages]) from error.__cause__


def config_of(settings: Mapping[str, Any]) -> SearchConfig:
    """The config of settings that are named as the flags are, `batch_size=4` for --batch-size 4.

    Raises ConfigError with all that are unknown or of the wrong type.
    """
    known = {name: value for name, value in settings.items() if value is not None}
    values, messages = convert_fields(SearchConfig, known)
    if messages:
        raise ConfigError(messages)
    return SearchConfig(**values)


def data_files(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """A file for each split that is given: a path or URL as it is; a DataFrame, or whatever has
    `to_pandas()`, written to the folder, where a resumed run finds it again."""
    found, messages = {}, []
    for split, given in data.items():
        if given is None:
            continue
        if isinstance(given, str | Path):
            found[split] = str(given)
            continue
        table = given if isinstance(given, pd.DataFrame) else _as_pandas(given)
        if table is None:
            messages.append(
                f"{split}: must be a path, a DataFrame or an object with to_pandas(), "
                f"got {type(given).__name__}."
            )
            continue
        file = folder / f"{split}.parquet"
        try:
            file.write_bytes(table.to_parquet(index=False))
        except Exception as error:  # Arrow raises several unrelated types
            messages.append(f"{split}: cannot be kept as a table of columns: {error}.")
            continue
        found[split] = str(file)
    if messages:
        raise ConfigError(messages)
    return found


def _as_pandas(given: Any) -> pd.DataFrame | None:
    convert = getattr(given, "to_pandas", None)
    table = convert() if callable(convert) else None
    return table if isinstance(table, pd.DataFrame) else None


def space_name(space: Any, folder: Path) -> str:
    """What --space takes: a name or path as it is; a function, or a dict of Ray Tune's domains,
    written to the folder."""
    if isinstance(space, str | Path):
        return str(space)
    if isinstance(space, Mapping):
        from tune_app.search.ray_tune.domains import space_of_domains

        file = folder / "space.yaml"
        file.write_text(yaml.safe_dump(space_of_domains(space), sort_keys=False), "utf-8")
        return str(file)
    if callable(space):
        return _written_function(space, folder)
    raise ConfigError(
        "space: must be a name, a path, a function of an Optuna trial or a dict of Ray Tune's "
        f"domains, got {type(space).__name__}."
    )


def _written_function(space: Callable[..., Any], folder: Path) -> str:
    name = getattr(space, "__name__", "")
    try:
        source = textwrap.dedent(inspect.getsource(space))
    except (OSError, TypeError):
        source = ""
    if not source.startswith("def ") or getattr(space, "__closure__", None):
        raise ConfigError(
            "space: must be a function that is defined with `def` and depends on nothing but the "
            f"trial, got {space!r}."
        )
    file = folder / "space.py"
    # Its annotations may name what only the caller has imported.
    file.write_text(f"from __future__ import annotations\n\n\n{source}", "utf-8")
    return f"{file}:{name}"
