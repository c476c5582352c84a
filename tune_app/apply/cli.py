"""The command `python -m tune_app.apply`: applies tuned prompts to texts, or evaluates them."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tune_app.apply.opening import check_model, find_prompts, opening_config
from tune_app.apply.prompts_folder import About, read_about
from tune_app.report.words import number
from tune_app.run.output import forgiving_output
from tune_app.run.search_config import SETTINGS, ConfigError, SearchConfig
from tune_app.search.checks import check_everything
from tune_app.serve.supervisor import PrivateSwarmError
from tune_app.tasks.known import task_named
from tune_app.train.one_process import Terminal

if TYPE_CHECKING:
    from tune_app.apply.generation import Sampling
    from tune_app.apply.inference import Prompts

_DESCRIPTION = """\
Applies tuned prompts, on the swarm where they were tuned or on this machine: completes a text
(causal-lm), classifies lines (class, tab, probability) or predicts a number for each (regression).
--evaluate shows how well they do on a file instead."""
_TEST_SPLIT = ""  # the value of --evaluate without a file
_LINES_AT_ONCE = 64  # answered together, unless a person types them


@forgiving_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 when the swarm fails, 2 for a user's mistake, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        folder = find_prompts(options.folder)
        about = read_about(folder)
        config = opening_config(
            about,
            model=options.model,
            revision=options.revision,
            backbone=options.backbone,
            peers=options.peers or (),
            device=options.device,
            own_data=options.evaluate == _TEST_SPLIT,
        )
        _check(options, config, about)
        same_files = check_model(about, config)
        with Terminal(quiet=options.quiet) as terminal:
            if not same_files:
                terminal.say(
                    f"note: the weight files of {config.model!r} differ from those that the "
                    "prompts were trained with; a copy in another file format is fine, retrained "
                    "weights are not"
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


def _check(options: argparse.Namespace, config: SearchConfig, about: About) -> None:
    """Raises ConfigError with all mistakes that can be found before anything starts."""
    messages = []
    sources = [flag for flag in ("prompt", "input", "evaluate") if vars(options)[flag] is not None]
    if len(sources) > 1:
        flags = " and ".join(f"--{flag}" for flag in sources)
        messages.append(f"{flags}: give only one of them.")
    if options.input is not None and (not options.input.exists() or options.input.is_dir()):
        messages.append(f"--input: there is no file {str(options.input)!r}.")
    if options.max_new_tokens < 1:
        messages.append(f"--max-new-tokens: must be 1 or more, got {options.max_new_tokens}.")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        messages.append(
            f"--temperature: must be above 0, got {options.temperature}; to take the most likely "
            "token each time, leave out --temperature and --top-p."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        messages.append(f"--top-p: must be above 0 and at most 1, got {options.top_p}.")
    drawn = [f for f in ("temperature", "top_p", "seed") if vars(options)[f] is not None]
    completes = task_named(about.task).answer is None
    if drawn and (not completes or options.evaluate is not None):
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in drawn)
        messages.append(f"{flags}: only for completing a text (--task causal-lm).")
    elif drawn == ["seed"]:
        messages.append("--seed: only with --temperature or --top-p, which sample tokens.")
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
        # These are the search's settings, not flags of this command.
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
    terminal.progress("loading the prompts")  # the first import of torch takes seconds
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
            notes.append("the data differ from the search's, so the results are not comparable")
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
    metrics = {"loss": evaluation.loss} | evaluation.metric
    text = ", ".join(f"{name} {number(value, name)}" for name, value in metrics.items())
    print(f"{split}: {text} ({len(rows)} rows)")


def _answer(options: argparse.Namespace, prompts: Prompts, terminal: Terminal) -> None:
    """One line per input line, so that `paste` can join them; blank for a blank one."""
    for lines in _lines(options, terminal):
        found = iter(prompts.answers([line for line in lines if line]) if any(lines) else [])
        terminal.erase()
        for line in lines:
            print(next(found) if line else "", flush=True)


def _lines(options: argparse.Namespace, terminal: Terminal) -> Iterator[list[str]]:
    """The texts to answer, in batches; one at a time if a person types them.

    From a table, the texts are in its text column; any other file has one text per line.
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
        terminal.say("Enter one text per line; Ctrl-D to finish.")
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
    """The file of --input. Raises ConfigError if it is not text."""
    from tune_app.tasks.files import decoded

    return decoded(str(options.input), options.input.read_bytes(), options.encoding)


def _complete(options: argparse.Namespace, prompts: Prompts, terminal: Terminal) -> None:
    """The text and its continuation, printed as it is generated."""
    if options.prompt is not None:
        text = options.prompt
    elif options.input is not None:
        text = _read(options).rstrip("\n")
    else:
        if sys.stdin.isatty():
            terminal.say("Enter the text to complete; Ctrl-D to finish.")
        text = sys.stdin.read().rstrip("\n")
    pieces = prompts.complete(text, options.max_new_tokens, _sampling(options))
    first = next(pieces, "")
    terminal.erase()
    print(text, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _sampling(options: argparse.Namespace) -> Sampling | None:
    """None means greedy."""
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
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of a run or of exported prompts"
    )
    text = parser.add_argument_group("input (without these flags: standard input)")
    text.add_argument(
        "--prompt", metavar="TEXT", help="one text to complete, or to predict a class or number for"
    )
    text.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="file with the text to complete, or with one text per line, or a table (csv, tsv, "
        "jsonl, json, parquet)",
    )
    text.add_argument(
        "--evaluate",
        nargs="?",
        const=_TEST_SPLIT,
        metavar="FILE",
        help="show loss and metrics on a csv, tsv, jsonl, json, parquet or txt file; without FILE, "
        "on the search's test split",
    )
    text.add_argument("--text-column", metavar="TEXT", help="column with the text in that file")
    text.add_argument("--label-column", metavar="TEXT", help="column with the label in that file")
    for name in ("prompt_column", "completion_column", "encoding", "delimiter"):
        text.add_argument("--" + name.replace("_", "-"), metavar="TEXT", help=SETTINGS[name].help)
    text.add_argument(
        "--max-new-tokens",
        type=int,
        default=40,
        metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )
    text.add_argument(
        "--temperature",
        type=float,
        metavar="NUMBER",
        help="sample tokens instead of taking the most likely one; below 1 is more predictable, "
        "above 1 more varied",
    )
    text.add_argument(
        "--top-p",
        type=float,
        metavar="NUMBER",
        help="sample from the most likely tokens that together have this probability",
    )
    text.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the sampling (default: 0, so the same call generates the same text)",
    )
    model = parser.add_argument_group("model and swarm (without these flags: as in the search)")
    model.add_argument("--model", metavar="TEXT", help="where the model is on this machine")
    model.add_argument("--revision", metavar="TEXT", help=SETTINGS["revision"].help)
    model.add_argument("--backbone", choices=("swarm", "local"), help=SETTINGS["backbone"].help)
    model.add_argument("--peers", nargs="+", metavar="ADDRESS", help=SETTINGS["peers"].help)
    model.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1 or mps")
    parser.add_argument("--quiet", action="store_true", help=SETTINGS["quiet"].help)
    return parser
