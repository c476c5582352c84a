"""The command line of a search: flags, --help and --config, all made from SearchConfig's fields."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tune_app.run.search_config import ONE_CALL_ONLY, ConfigError, SearchConfig, read_settings
from tune_app.run.typed import convert_fields, did_you_mean

DESCRIPTION = """\
Finds the learning rate, schedule, warmup and weight decay, and the length and start of the prompts,
for prompt tuning a frozen language model, and hands over the tuned prompts. Without any flag: a
real search on a small model and a private swarm, in minutes.
"""

EXAMPLE = """\
example:
  python -m tune_app.search --train reviews.csv --text-column text --label-column stars \\
      --space deep --trials 32 --time-budget 20m --out runs/reviews

Settings may also stand in a YAML file (--config), under the same names: `batch-size: 16`.
Flags win over the file, the file over the defaults. What a search found is such a file
(best.yaml in the folder of the run).
"""


# Group of --help -> field -> its text. A test holds it against the fields of SearchConfig.
HELP = {
    "what to search": {
        "space": "a name in search_spaces/, a .yaml file, or Optuna define-by-run Python as "
        "module:function or file.py:function",
        "task": "what the model learns: classification, causal-lm or regression (a number for each "
        "text)",
    },
    "data": {
        "train": "training file: csv, tsv, jsonl, json, parquet or txt, a path or a URL that "
        "pandas opens; without one, the built-in text of the task",
        "valid": "validation file; without one, a tenth of --train",
        "test": "test file, seen by no trial, only by --confirm",
        "text_column": "column of the text in your files",
        "label_column": "column of the label: a class, or for regression a number",
        "encoding": "of text files: cp1252, utf-16, ...; without it, UTF-8 or what a byte order "
        "mark says",
        "delimiter": "between the fields of csv and tsv: one character or tab; without it, from "
        "the file",
    },
    "model and swarm": {
        "model": "demo, a model's folder, or its name on a hub (organisation/name)",
        "revision": "branch, tag or commit of a model on a hub; without it, its main branch",
        "backbone": "where the frozen blocks run: on Petals servers or in this process",
        "peers": "multiaddresses of your own swarm; without any, a private swarm is started",
        "request_tokens": "rows times tokens that your servers take in one request "
        "(their --max_batch_size); without it 1024, as Petals' client sends",
        "device": "cpu, cuda, cuda:1 or mps; without it, cuda where there is one, else cpu",
        "dtype": "float32, bfloat16 or float16",
    },
    "each trial": {
        "tuning_mode": "prompts before the input, or deep ones in every block",
        "prompt_length": "trained prompt vectors",
        "init_text": "what prompts begin with where a config's init is text: words that say the "
        "task, repeated or cut to the prompt's length",
        "steps": "optimizer steps of a full trial",
        "batch_size": "rows in a step",
        "max_length": "tokens of text in a row, without the prompt",
        "eval_rows": "validation rows that trials are compared on: a sample, each class with its "
        "share",
    },
    "how to search, and how long": {
        "trials": "trials of the search, the documented default among them",
        "time_budget": "stop after this long: seconds, or 10m, 2h",
        "token_budget": "stop after this many tokens through the backbone: 5e6, 5M",
        "concurrency": "trials that train at once; without it, from the model and the machine",
        "sampler": "Optuna's sampler, which suggests the configs",
        "prior": "off: ignore the space's priors, which say where good values are expected",
        "scheduler": "Ray Tune's trial scheduler, which stops bad trials early; pbt changes all "
        "trials while they train, together",
        "objective": "what is optimised, and decides the answer: loss; accuracy or f1 (macro) of a "
        "classification; perplexity of causal-lm",
        "confirm": "best configs that are trained again with fresh seeds; the best of them by "
        "validation is judged against the default on the test split",
        "confirm_seeds": "further seeds that judge: 3, and where those do not decide, up to this "
        "many",
        "seed": "seed of the suggestions, the data order and the prompts",
    },
    "the run": {
        "out": "folder of the run; without it, runs/<date>-<time>",
        "resume": "folder of a run to go on with; with more --trials, also a finished one",
        "allow_changed_space": "resume although space, model or data are not as the run began",
        "storage": "Optuna storage URL; without it, the study is kept in the run's folder",
        "mlflow": "tracking URI of an MLflow that gets every trial, too: http://127.0.0.1:5000",
        "wandb": "project of Weights & Biases that gets every trial, too",
        "executor": "ray, or in-process: the trials are threads of the command, for debugging",
        "address": "Ray cluster to join (host:port or auto); without it, Ray starts here",
        "hosts": "trial hosts, each with its copy of the model; without it, one per GPU or node, "
        "on a CPU one for 4 trials at once",
        "dry_run": "print the space, sample configs and the cost, and start nothing",
        "quiet": "only the result",
        "verbose": "everything, the logs of Ray and Petals too",
    },
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)  # argparse would print the first mistake and exit


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # Values are optional to argparse only, so that it does not stop at the first missing one.
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
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", nargs="?", metavar="FILE", help="YAML file of these settings (best.yaml, say)"
    )
    hints = typing.get_type_hints(SearchConfig)
    defaults = {field.name: field.default for field in dataclasses.fields(SearchConfig)}
    for title, texts in HELP.items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            hint, default = hints[name], defaults[name]
            if hint is bool:
                group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text)
                continue
            if default is not None and default != ():
                text += f" (default: {default})"
            if hint == tuple[str, ...]:
                options: dict[str, Any] = {"nargs": "*", "action": "extend", "metavar": "ADDRESS"}
            else:  # a flag without its value is one mistake among others, hence optional here
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

    With `--resume DIR` the settings that run began with (DIR/search.yaml) stand below both, and
    `out` is DIR.

    Raises:
        ConfigError: all mistakes in flags and files. Ranges and files are `check_search_config`'s.
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
            values = {k: v for k, v in begun.items() if k not in ONE_CALL_ONLY} | values
        values["out"] = folder
    if messages:
        raise ConfigError(messages)
    return SearchConfig(**values)


def _unknown_words(rest: Sequence[str], known: Sequence[str]) -> list[str]:
    messages = []
    after_unknown_flag = False  # its value, then: not a mistake of its own
    for word in rest:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            messages.append(f"{flag}: unknown flag.{did_you_mean(flag, known)}")
            after_unknown_flag = "=" not in word
        elif not after_unknown_flag:
            messages.append(f"{word!r}: settings are given with flags, such as --space {word}.")
    return messages
