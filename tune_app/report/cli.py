"""python -m tune_app.report RUN [RUN2 …]: rebuilds a run's tables and page from its events.

With several runs: one page that compares them. Works while a search runs, and after it died.
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
from tune_app.report.write import write_all
from tune_app.run.output import forgiving_output
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import ConfigError


@forgiving_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.report", description=__doc__.split("\n\n", 1)[1]
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison.html"),
        help="where the comparison of several runs goes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = _checked(options.runs)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    width = shutil.get_terminal_size((100, 24)).columns
    for run in runs:
        text = write_all(run, width)
        print(text if len(runs) == 1 else f"Report: {run.report_html}\n", end="")
    if len(runs) > 1:
        out = options.out.expanduser().absolute()
        runs[0].write_atomic(out, comparison_page([load(run) for run in runs]))
        print(f"Comparison: {out}")
    return 0


def _checked(paths: Sequence[str]) -> list[RunDir]:
    """The runs, each once. Raises ConfigError with every folder that is none."""
    runs = {RunDir(path).path: RunDir(path) for path in paths}
    wrong = []
    for path, run in runs.items():
        if not path.is_dir():
            wrong.append(f"RUN must be the folder of a search; {path} does not exist")
        elif not run.events_jsonl.exists():
            wrong.append(f"RUN must be the folder of a search; {path} holds no events.jsonl")
        elif not os.access(path, os.W_OK):
            wrong.append(f"The report is written into RUN; {path} is not writable")
    if wrong:
        raise ConfigError(wrong)
    return list(runs.values())
