"""The command `python -m tune_app.report`.

Rebuilds the tables and the page of a run from its events. With several runs, also writes one page
that compares them. Works while a search is running, and after it was killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tune_app.report.page.comparison import comparison_page
from tune_app.report.results import load
from tune_app.report.summary import files, findings
from tune_app.report.write import write_files
from tune_app.run.output import forgiving_output
from tune_app.run.paths import user_path
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError


@forgiving_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.report", description=__doc__.split("\n\n", 1)[1]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("comparison.html"),
        help="file for the comparison of several runs (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = _checked(options.runs)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    width = shutil.get_terminal_size((100, 24)).columns
    failed = []
    for run in runs:
        results = load(run)
        if len(runs) == 1:  # before anything is written, which may fail
            print(findings(results, width))
        failed += write_files(results, width)
        print(files(results, width) if len(runs) == 1 else f"Report: {run.report_html}\n", end="")
    if len(runs) > 1:
        out = user_path(options.out).absolute()
        try:
            runs[0].write_atomic(out, comparison_page([load(run) for run in runs]))
            print(f"Comparison: {out}")
        except OSError as error:
            failed.append(f"{out}: {error.strerror or error}")
    for file in failed:
        print(f"could not be written: {file}", file=sys.stderr)
    return int(bool(failed))


def _checked(paths: Sequence[str]) -> list[RunDir]:
    """The runs, without duplicates. Raises ConfigError with every folder that is not a run."""
    runs = {RunDir(path).path: RunDir(path) for path in paths}
    wrong = []
    for path, run in runs.items():
        if not path.is_dir():
            wrong.append(f"RUN must be the folder of a search; {path} does not exist")
        elif not run.events_jsonl.exists():
            wrong.append(f"RUN must be the folder of a search; {path} has no events.jsonl")
        elif not os.access(path, os.W_OK):
            wrong.append(
                f"RUN must be writable, because the report is written there; {path} is not"
            )
    if wrong:
        raise ConfigError(wrong)
    return list(runs.values())
