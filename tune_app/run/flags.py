"""The command line of a search: flags, --help and --config, derived from SearchConfig's fields."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tune_app.run.own_code import code_named, is_own, not_own
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import (
    SETTINGS,
    ConfigError,
    SearchConfig,
    read_settings,
    settings_under,
    settings_with,
)
from tune_app.run.settings import Role
from tune_app.run.typed import convert_fields, did_you_mean

DESCRIPTION = """\
Finds the learning rate, schedule, warmup and weight decay, and the length and initialisation of the
prompts, for prompt tuning a frozen language model, and exports the tuned prompts. Without any flag
it runs a real search on a small model and a private swarm in a few minutes.
"""

EXAMPLE = """\
example:
  python -m tune_app.search --train reviews.csv --text-column text --label-column stars \\
      --space deep --trials 32 --time-budget 20m --out runs/reviews

Settings can also be given in a YAML file (--config), under the same names: `batch-size: 16`.
Flags take precedence over the file, and the file over the defaults. A search writes its result
as such a file (best.yaml in the run's folder).
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)  # argparse would print the first mistake and exit


class FlagFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows values as required: only argparse sees them as optional, so that it does not stop at
    the first missing one."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar) if action.nargs in ("?", "*") else ""


def flag_of(name: str) -> str:
    """The flag of a field: "batch_size" is --batch-size."""
    return "--" + name.replace("_", "-")


def build_parser(prog: str = "python -m tune_app.search") -> argparse.ArgumentParser:
    """One flag per field of SearchConfig, grouped, plus --config. Values stay text here."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=FlagFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", nargs="?", metavar="FILE", help="YAML file with these settings, e.g. best.yaml"
    )
    hints = typing.get_type_hints(SearchConfig)
    defaults = {field.name: field.default for field in dataclasses.fields(SearchConfig)}
    for title in dict.fromkeys(known.group for known in SETTINGS.values() if known.group):
        group = parser.add_argument_group(title)
        for name in settings_under(title):
            hint, default, text = hints[name], defaults[name], SETTINGS[name].help
            if hint is bool:
                group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text)
                continue
            if default is not None and default != ():
                text += f" (default: {default})"
            if typing.get_origin(hint) is tuple:
                what = "ADDRESS" if typing.get_args(hint)[0] is str else "RUN"
                options: dict[str, Any] = {"nargs": "*", "action": "extend", "metavar": what}
            else:  # optional, so that a missing value is reported along with all other mistakes
                options = {"nargs": "?", "metavar": _metavar(hint)}
            group.add_argument(flag_of(name), help=text, **options)
    return parser


def _metavar(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(options) + "}"
    kind = next((option for option in options if option is not type(None)), hint)
    return {int: "N", float: "TIME", Path: "FOLDER"}.get(kind, "TEXT")


def parse_search_args(argv: Sequence[str] | None = None) -> SearchConfig:
    """The config that a command line (sys.argv by default) and its --config describe.

    With `--resume DIR` both take precedence over the settings that the run started with
    (DIR/search.yaml), and `out` is DIR.

    Raises:
        ConfigError: all mistakes in flags and files, except what `check_search_config` checks.
        SystemExit: --help (0).
    """
    parser = build_parser()
    namespace, rest = parser.parse_known_args(argv)
    given = vars(namespace)
    messages = _unknown_words(rest, [s for a in parser._actions for s in a.option_strings])
    for name in [name for name, value in given.items() if value is None or value == []]:
        messages.append(f"{flag_of(name)}: needs a value.")
        del given[name]
    values: dict[str, Any] = {}
    if "config" in given:
        values, mistakes = read_settings(Path(given.pop("config")))
        messages += mistakes
    flags, mistakes = convert_fields(SearchConfig, given, label=flag_of)
    values |= flags
    messages += mistakes
    if values.get("resume") is not None:
        folder = values["resume"]
        if (folder / "search.yaml").is_file():
            begun, mistakes = read_settings(folder / "search.yaml")
            messages += mistakes
            one_call = settings_with(Role.ONE_CALL)
            values = {k: v for k, v in begun.items() if k not in one_call} | values
            code = code_named(str(values.get("space", "")))
            if code is not None and "space" not in flags and not is_own(RunDir(folder), code):
                messages.append(not_own("--resume", code))
        values["out"] = folder
    if messages:
        raise ConfigError(messages)
    return SearchConfig(**values)


def _unknown_words(rest: Sequence[str], known: Sequence[str]) -> list[str]:
    messages = []
    after_unknown_flag = False  # then the word is that flag's value, not another mistake
    for word in rest:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            messages.append(f"{flag}: unknown flag.{did_you_mean(flag, known)}")
            after_unknown_flag = "=" not in word
        elif not after_unknown_flag:
            messages.append(f"{word!r}: settings are given as flags, such as --space {word}.")
    return messages
