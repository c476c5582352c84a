"""The command `python -m tune_app.search`: checks everything, searches, shows the results."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace

from tune_app.report.results import load
from tune_app.report.summary import files, findings
from tune_app.report.verdict import verdict
from tune_app.report.write import write_files
from tune_app.run.flags import parse_search_args
from tune_app.run.output import forgiving_output
from tune_app.run.run_dir import RunDir, new_run
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search.checks import check_everything
from tune_app.search.dry_run import dry_run
from tune_app.search.executor import StartError, open_executor
from tune_app.search.live import LiveView
from tune_app.search.stop_conditions import StopConditions, interruptible
from tune_app.search.tuning import whole_search
from tune_app.study.space import SearchSpace
from tune_app.study.storage import PATIENCE_S, check_study, is_locked


@forgiving_output()
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if the search has an answer, whatever it is; 1 if no trial has finished, no more
    can be trained, or a file could not be written; 2 for a user's mistake; 130 after Ctrl-C, 143
    after SIGTERM, 129 after SIGHUP."""
    try:
        config = parse_search_args(argv)
        space = check_everything(config)
        if config.dry_run:
            print(dry_run(config, space))
            return 0
        check_study(config)
        run = RunDir(config.out) if config.out else new_run()
        with run.lock():
            return run_search(replace(config, out=run.path), space, run)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        if not is_locked(error):
            raise
        print(
            f"Another process locked the study for {PATIENCE_S:g} s, so the search has ended. "
            "No results are lost; continue with --resume.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped immediately; continue with --resume", file=sys.stderr)
        return 130


def run_search(config: SearchConfig, space: SearchSpace, run: RunDir) -> int:
    """Runs or resumes the search in `run`, confirms its best configs, and shows the results."""

    view, stop = LiveView(config, run), StopConditions(config)

    def ray_died() -> None:
        view.stop()
        again = f"Continue with: {_resume(run)}" if run.events() else "Run the same command again."
        print(f"Ray has died. {again}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # the main thread waits for Ray, and nothing can interrupt that

    with (
        view,
        open_executor(
            config, space, run, progress=view.progress, say=view.say, ray_died=ray_died
        ) as executor,
        # Signal handlers are set after Ray's own; until then, Ctrl-C stops immediately.
        interruptible(stop, view.say),
    ):
        whole_search(config, space, run, executor, view, stop)
    code = show_results(run)
    if stop.exit_code == 1:
        print(
            f"The search ended because no trial can train any more: {stop.reason}\n"
            f"Once that is fixed, continue with: {_resume(run)}",
            file=sys.stderr,
        )
    return stop.exit_code or code


def show_results(run: RunDir) -> int:
    """Prints the results, then writes each file separately, so that a full disk loses no answer.

    Returns 1 if no trial has finished or a file could not be written, else 0.
    """
    from tune_app.apply.export import export_best  # imports torch

    width, results = _terminal_width(), load(run)
    print(findings(results, width), flush=True)
    failed = []
    try:
        export_best(run)
    except Exception as error:  # from torch, safetensors or the file system; none may stop this
        failed.append(f"{run.prompts.name}: {error}")
    results = load(run)
    failed += write_files(results, width)
    print(files(results, width), end="", flush=True)
    for file in failed:
        print(f"could not be written: {file}", file=sys.stderr)
    return max(verdict(results).exit_code, int(bool(failed)))


def _resume(run: RunDir) -> str:
    return shlex.join(["python", "-m", "tune_app.search", "--resume", str(run.path)])


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100
