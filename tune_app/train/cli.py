"""The command `python -m tune_app.train`: one config trained alone, without Ray."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tune_app.apply.export import export_best
from tune_app.report.tables import write_tables
from tune_app.report.words import duration, number
from tune_app.run.flags import FlagFormatter, flag_of, parse_search_args
from tune_app.run.output import forgiving_output
from tune_app.run.run_dir import RunDir, Status, new_run
from tune_app.run.search_config import (
    SETTINGS,
    ConfigError,
    SearchConfig,
    TrialConfig,
    settings_with,
)
from tune_app.run.settings import Role
from tune_app.run.trial_report import Report
from tune_app.search.checks import check_everything
from tune_app.serve.supervisor import PrivateSwarmError
from tune_app.train.one_process import Terminal
from tune_app.train.single import train_single

if TYPE_CHECKING:
    from tune_app.tasks.data import TaskData

_DESCRIPTION = """\
Trains one config alone, exactly like a trial of a search: with the same data order and the same
initial prompts, and so the same losses up to rounding. Then saves the prompts and evaluates them
on the test split. The config can be the best.yaml of a search; by default it is the documented
default.
"""


@forgiving_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if the prompts were saved, 1 if training failed, 2 for a user's mistake, 130
    after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    _help_parser().parse_known_args(argv)  # --help ends here
    try:
        config, trial = parse_train_args(argv)
        check_everything(replace(config, trial=trial.to_dict(), prompt_length=trial.prompt_length))
        run = RunDir(config.out) if config.out else new_run("train-")
        with run.lock():
            return train(config, trial, run)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except PrivateSwarmError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no prompts were saved", file=sys.stderr)
        return 130


def parse_train_args(argv: Sequence[str]) -> tuple[SearchConfig, TrialConfig]:
    """The settings, and the config to train: that of --config, changed by flags such as --steps.

    Raises ConfigError with all mistakes.
    """
    given = {word.partition("=")[0] for word in argv}
    kept = settings_with(Role.TRAINING)
    messages = [
        f"{flag_of(name)}: only for a search; this command trains one config."
        for name in SETTINGS
        if name not in kept and flag_of(name) in given
    ]
    try:
        told = parse_search_args(argv)
    except ConfigError as error:
        raise ConfigError([*messages, *error.messages]) from None
    config = SearchConfig(**{name: getattr(told, name) for name in kept})
    trial = config.base_trial()
    try:
        trial = TrialConfig.from_dict(config.trial or {}, trial)
    except ConfigError as error:
        messages += [f"trial: {message}" for message in error.messages]
    if messages:
        raise ConfigError(messages)
    flags = {
        name: getattr(config, name) for name in settings_with(Role.TRIAL) if flag_of(name) in given
    }
    return config, replace(trial, **flags)


def train(config: SearchConfig, trial: TrialConfig, run: RunDir) -> int:
    """Trains, shows the progress, and exports the prompts."""
    with Terminal(quiet=config.quiet) as terminal:

        def reported(report: Report, data: TaskData) -> None:
            metric, tested = data.task.metric, report.metrics.get("test_loss")
            terminal.erase()
            print(_line(report, trial.steps, metric), flush=True)
            if tested is not None:
                print(f"test loss {number(tested, 'loss')}", end=", ")
                print(f"{metric} {number(report.metrics[f'test_{metric}'], metric)}", end=" ")
                print(f"({len(data.test)} rows)", flush=True)

        status, reason = train_single(config, trial, run, terminal, reported)
        if status == Status.FAILED:
            terminal.erase()
            print(f"the swarm is gone: {reason}", file=sys.stderr)
        elif status != Status.FINISHED:
            print(f"{reason}; no prompts were saved", file=sys.stderr)
    write_tables(run)
    prompts = export_best(run)
    if prompts is None:
        return 1
    apply = shlex.join(["python", "-m", "tune_app.apply", str(run.path)])
    terminal.say(f"prompts: {prompts}\nuse them: {apply}")
    return 0


def _line(report: Report, steps: int, metric: str) -> str:
    return (
        f"step {report.step:>{len(str(steps))}} of {steps}: "
        f"train loss {number(report.train_loss, 'loss')}, "
        f"valid loss {number(report.eval_loss, 'loss')}, "
        f"{metric} {number(report.metrics[metric], metric)}, "
        f"lr {number(report.learning_rate, 'lr')}, {duration(report.seconds)}"
    )


def _help_parser() -> argparse.ArgumentParser:
    """Only for --help; the arguments are parsed with the search's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.train",
        usage="python -m tune_app.train [--config FILE] [--out FOLDER] [flags of a search]",
        description=_DESCRIPTION,
        formatter_class=FlagFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", nargs="?", metavar="FILE", help="YAML file with settings, e.g. best.yaml"
    )
    parser.add_argument(
        "--out", nargs="?", metavar="FOLDER", help="folder of the run (default: runs/train-<date>)"
    )
    parser.add_argument("--quiet", action="store_true", help=SETTINGS["quiet"].help)
    own = ("out", "quiet", "trial")
    flags = [flag_of(name) for name in settings_with(Role.TRAINING) if name not in own]
    parser.epilog = textwrap.fill(
        f"Also takes these flags of tune_app.search: {', '.join(flags)}. Flags take precedence "
        "over the file.",
        width=100,
        break_on_hyphens=False,
    )
    return parser
