"""Turns what a caller gives (settings by name, DataFrames, spaces) into a config and files."""

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
from tune_app.tasks.files import HasToPandas, keep_table


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Makes messages in this block name function arguments instead of the commands' flags."""
    names = {"--" + field.name.replace("_", "-"): field.name for field in fields(SearchConfig)}

    def renamed(message: str) -> str:
        return re.sub(r"--[a-z][a-z-]*", lambda flag: names.get(flag[0], flag[0]), message)

    try:
        yield
    except ConfigError as error:
        raise ConfigError([renamed(message) for message in error.messages]) from error.__cause__


def config_of(settings: Mapping[str, Any]) -> SearchConfig:
    """The config of settings that are named like the flags: `batch_size=4` for --batch-size 4.

    Raises ConfigError with all settings that are unknown or of the wrong type.
    """
    known = {name: value for name, value in settings.items() if value is not None}
    values, messages = convert_fields(SearchConfig, known)
    if messages:
        raise ConfigError(messages)
    return SearchConfig(**values)


def data_files(data: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """A file for each split that is given: a path or URL stays as it is; a table in memory is
    written to the folder."""
    found, messages = {}, []
    for split, given in data.items():
        if given is None:
            continue
        if not isinstance(given, str | Path | pd.DataFrame | HasToPandas):
            messages.append(
                f"{split}: must be a path, a DataFrame or an object with to_pandas(), "
                f"got {type(given).__name__}."
            )
            continue
        try:
            found[split] = keep_table(given, folder / f"{split}.parquet")
        except ConfigError as error:
            messages += error.messages
    if messages:
        raise ConfigError(messages)
    return found


def space_name(space: Any, folder: Path) -> str:
    """The value of --space: a name or path stays as it is; a function, or a dict of Ray Tune's
    domains, is written to the folder."""
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
        "space: must be a name, a path, a function of an Optuna trial, or a dict of Ray Tune "
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
            "space: must be a function that is defined with `def` and depends only on the trial, "
            f"got {space!r}."
        )
    file = folder / "space.py"
    # Annotations may use names that only the caller has imported.
    file.write_text(f"from __future__ import annotations\n\n\n{source}", "utf-8")
    return f"{file}:{name}"
