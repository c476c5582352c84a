"""The command `python -m tune_app.apply`: what tuned prompts do, on texts or on a whole file."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_app.apply.export import export_best
from tune_app.apply.prompts_folder import ABOUT, About, read_about
from tune_app.models.folder import model_folder
from tune_app.models.identity import ModelIdentity
from tune_app.report.words import number
from tune_app.run.output import forgiving_output
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import DATA, SETTINGS, ConfigError, SearchConfig, settings_under
from tune_app.search.checks import check_everything
from tune_app.serve.supervisor import PrivateSwarmError
from tune_app.tasks.known import task_named
from tune_app.train.one_process import Terminal

if TYPE_CHECKING:
    from tune_app.apply.generation import Sampling
    from tune_app.apply.inference import Prompts

_DESCRIPTION = """\
Loads tuned prompts, on the swarm they were tuned on or on this machine, and completes a text
(causal LM), classifies lines (label, tab, probability) or gives each its number (regression), or
evaluates on a file."""
_TEST_SPLIT = ""  # what --evaluate is without a file
_LINES_AT_ONCE = 64  # that are answered together, where no person types them


@forgiving_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when the swarm fails, 2 for a user's mistake, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        folder = prompts_folder(options.folder)
        about = read_about(folder)
        config = _config(options, about)
        _check(options, config, about)
        folder_here = model_folder(config.model, config.revision)
        here = ModelIdentity.of(config.model, folder_here, config.revision)
        if refusal := about.model.refusal(here):
            raise ConfigError(refusal)
        with Terminal(quiet=options.quiet) as terminal:
            if here.weights_fingerprint != about.model.weights_fingerprint:
                terminal.say(
                    f"note: the weight files of {config.model!r} are not those that the prompts "
                    "were trained with; another format does no harm, another training does"
                )
            return _apply(options, folder, about, config, terminal)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except PrivateSwarmError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def prompts_folder(path: Path) -> Path:
    """The folder of prompts at `path`: itself, or that of a run, exported now if need be.

    Raises ConfigError where there is none.
    """
    run = RunDir(path)
    if (run.path / ABOUT).is_file():
        return run.path
    if run.prompts_json.is_file():
        return run.prompts
    if not run.events_jsonl.is_file():
        raise ConfigError(
            f"{str(path)!r}: neither a run (no {run.events_jsonl.name}) nor a folder of prompts "
            f"(no {ABOUT})."
        )
    prompts = export_best(run)  # the search was killed before it did
    if prompts is None:
        raise ConfigError(f"{str(path)!r}: no prompts yet, for none of its trials has finished.")
    return prompts


def _config(options: argparse.Namespace, about: About) -> SearchConfig:
    """The search's settings with this call's own; without its data where they are not needed."""
    config = about.search_config()
    if options.evaluate != _TEST_SPLIT:
        unset: dict[str, Any] = dict.fromkeys(settings_under(DATA))
        config = replace(config, **unset)
    if options.backbone == "local":
        config = replace(config, peers=())
    elif options.peers:
        config = replace(config, backbone="swarm", peers=tuple(options.peers))
    if options.model is not None or options.revision is not None:
        config = replace(config, revision=options.revision)
    given = {name: vars(options)[name] for name in ("model", "backbone", "device")}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _check(options: argparse.Namespace, config: SearchConfig, about: About) -> None:
    """Raises ConfigError with all that can be found wrong before anything starts."""
    messages = []
    sources = [flag for flag in ("prompt", "input", "evaluate") if vars(options)[flag] is not None]
    if len(sources) > 1:
        flags = " and ".join(f"--{flag}" for flag in sources)
        messages.append(f"{flags}: each says what to work on; give one of them.")
    if options.input is not None and (not options.input.exists() or options.input.is_dir()):
        messages.append(f"--input: there is no file {str(options.input)!r}.")
    if options.max_new_tokens < 1:
        messages.append(f"--max-new-tokens: must be 1 or more, got {options.max_new_tokens}.")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        messages.append(
            f"--temperature: must be above 0, got {options.temperature}; without it (and --top-p) "
            "the likeliest token is taken."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        messages.append(f"--top-p: must be above 0 and at most 1, got {options.top_p}.")
    drawn = [f for f in ("temperature", "top_p", "seed") if vars(options)[f] is not None]
    completes = task_named(about.task).answer is None
    if drawn and (not completes or options.evaluate is not None):
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in drawn)
        messages.append(f"{flags}: only where a text is continued (--task causal-lm).")
    elif drawn == ["seed"]:
        messages.append("--seed: draws nothing without --temperature or --top-p.")
    elif options.seed is not None and options.seed < 0:
        messages.append(f"--seed: must be 0 or more, got {options.seed}.")
    if options.peers and options.backbone == "local":
        messages.append("--peers: only with --backbone swarm, got --backbone local.")
    try:
        check_everything(
            replace(config, prompt_length=about.config.prompt_length),
            needs_data=options.evaluate == _TEST_SPLIT,
        )
    except ConfigError as error:
        # These two are the search's own and no flags of this command.
        messages += [
            re.sub(r"^--(train|valid|test):", r"the search's --\1:", message)
            for message in error.messages
        ]
    if messages:
        raise ConfigError(messages)


def _apply(
    options: argparse.Namespace,
    folder: Path,
    about: About,
    config: SearchConfig,
    terminal: Terminal,
) -> int:
    terminal.progress("loading the prompts")  # torch, at first
    from tune_app.apply.inference import open_prompts
    from tune_app.backbones.protocol import BackboneUnavailable

    try:
        with open_prompts(folder, about, config, progress=terminal.progress) as prompts:
            if options.evaluate is not None:
                _evaluate(options, prompts, config, terminal)
            elif prompts.task.answer is not None:
                _answer(options, prompts, terminal)
            else:
                _complete(options, prompts, terminal)
    except BackboneUnavailable as error:
        terminal.erase()
        print(f"the swarm is gone: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(
    options: argparse.Namespace, prompts: Prompts, config: SearchConfig, terminal: Terminal
) -> None:
    from tune_app.tasks.evaluation_file import load_evaluation_file
    from tune_app.tasks.loading import load_task_data

    if options.evaluate == _TEST_SPLIT:
        data = load_task_data(config, prompts.tokenizer)
        rows, split = data.test, "test"
        notes = [note for note in data.notes if " test " in note]
        if data.fingerprint != prompts.about.data_fingerprint:
            notes.append("the data are not those of the search, so its figures do not compare")
    else:
        names = [*("text_column", "label_column", "prompt_column", "completion_column")]
        names += ["encoding", "delimiter"]
        columns = {name: vars(options)[name] for name in names}
        rows, notes = load_evaluation_file(
            options.evaluate,
            replace(config, **columns),
            prompts.tokenizer,
            prompts.about.class_names,
            prompts.about.scale,
        )
        split = Path(options.evaluate).name
    for note in notes:
        terminal.say(f"note: {note}")
    terminal.progress(f"evaluating {len(rows)} rows")
    evaluation = prompts.evaluate(rows)
    terminal.erase()
    figures = {"loss": evaluation.loss} | evaluation.metric
    text = ", ".join(f"{name} {number(value, name)}" for name, value in figures.items())
    print(f"{split}: {text} ({len(rows)} rows)")


def _answer(options: argparse.Namespace, prompts: Prompts, terminal: Terminal) -> None:
    """A line for each line, so that `paste` puts them together; blank for a blank one."""
    for lines in _lines(options, terminal):
        found = iter(prompts.answers([line for line in lines if line]) if any(lines) else [])
        terminal.erase()
        for line in lines:
            print(next(found) if line else "", flush=True)


def _lines(options: argparse.Namespace, terminal: Terminal) -> Iterator[list[str]]:
    """The texts to answer, some at a time; one at a time where a person types them.

    A table's texts are those of its text column, a row each; of any other file, its lines.
    """
    if options.prompt is not None:
        yield [options.prompt.strip()]
        return
    if options.input is not None:
        texts = iter(_texts_of(options, terminal))
        while lines := [text.strip() for text in islice(texts, _LINES_AT_ONCE)]:
            yield lines
        return
    typed = sys.stdin.isatty()
    if typed:
        terminal.say("a text a line, please; Ctrl-D ends")
    while lines := [line.strip() for line in islice(sys.stdin, 1 if typed else _LINES_AT_ONCE)]:
        yield lines


def _texts_of(options: argparse.Namespace, terminal: Terminal) -> list[str]:
    from tune_app.tasks.files import is_table
    from tune_app.tasks.readers import Reading, read_texts

    path = str(options.input)
    if not is_table(path):
        return _read(options).splitlines()
    names = ("text_column", "encoding", "delimiter")
    reading = Reading("none", **{name: vars(options)[name] for name in names})
    texts = read_texts(path, reading, keep_empty=True)
    for note in texts.notes or [f"{options.input.name}: {texts.columns}"]:
        terminal.say(f"note: {note}")
    return texts.texts


def _read(options: argparse.Namespace) -> str:
    """The file of --input. Raises ConfigError where it is not text."""
    from tune_app.tasks.files import decoded

    return decoded(str(options.input), options.input.read_bytes(), options.encoding)


def _complete(options: argparse.Namespace, prompts: Prompts, terminal: Terminal) -> None:
    """The text and its continuation, shown as it comes."""
    if options.prompt is not None:
        text = options.prompt
    elif options.input is not None:
        text = _read(options).rstrip("\n")
    else:
        if sys.stdin.isatty():
            terminal.say("the text to go on with, please; Ctrl-D ends it")
        text = sys.stdin.read().rstrip("\n")
    pieces = prompts.complete(text, options.max_new_tokens, _sampling(options))
    first = next(pieces, "")
    terminal.erase()
    print(text, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _sampling(options: argparse.Namespace) -> Sampling | None:
    """None: greedy."""
    from tune_app.apply.generation import Sampling

    if options.temperature is None and options.top_p is None:
        return None
    return Sampling(
        temperature=1.0 if options.temperature is None else options.temperature,
        top_p=1.0 if options.top_p is None else options.top_p,
        seed=options.seed or 0,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.apply", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run, or a folder of prompts")
    text = parser.add_argument_group("what to work on (without any of these: standard input)")
    text.add_argument(
        "--prompt", metavar="TEXT", help="the text to complete, to classify or to give its number"
    )
    text.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="the text to complete, one text a line, or a table (csv, tsv, jsonl, json, parquet)",
    )
    text.add_argument(
        "--evaluate",
        nargs="?",
        const=_TEST_SPLIT,
        metavar="FILE",
        help="loss and metric on a csv, tsv, jsonl, parquet or txt file; without FILE, on the "
        "test split of the search",
    )
    text.add_argument("--text-column", metavar="TEXT", help="column of the text in that file")
    text.add_argument("--label-column", metavar="TEXT", help="column of the label in that file")
    for name in ("prompt_column", "completion_column", "encoding", "delimiter"):
        text.add_argument("--" + name.replace("_", "-"), metavar="TEXT", help=SETTINGS[name].help)
    text.add_argument(
        "--max-new-tokens",
        type=int,
        default=40,
        metavar="N",
        help="longest continuation (default: %(default)s)",
    )
    text.add_argument(
        "--temperature",
        type=float,
        metavar="NUMBER",
        help="draw tokens in place of the likeliest one: below 1 closer to it, above 1 freer",
    )
    text.add_argument(
        "--top-p",
        type=float,
        metavar="NUMBER",
        help="draw from the likeliest tokens that together have this probability",
    )
    text.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of what is drawn (default: 0, so the same call draws the same text)",
    )
    model = parser.add_argument_group("model and swarm (without these: as in the search)")
    model.add_argument("--model", metavar="TEXT", help="the same model in another place")
    model.add_argument("--revision", metavar="TEXT", help=SETTINGS["revision"].help)
    model.add_argument("--backbone", choices=("swarm", "local"), help=SETTINGS["backbone"].help)
    model.add_argument("--peers", nargs="+", metavar="ADDRESS", help="addresses of your own swarm")
    model.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1 or mps")
    parser.add_argument("--quiet", action="store_true", help="only the result")
    return parser
