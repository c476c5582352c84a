"""Writes all files that are made from a run's events, once or repeatedly during a search."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tune_app.report.page.page import report_page
from tune_app.report.results import Results, load
from tune_app.report.summary import summary
from tune_app.report.tables import tables
from tune_app.run.event_log import read
from tune_app.run.events import TrialEnded
from tune_app.run.run_dir import RunDir

# Shortest time between two rebuilds during a search; one takes half a second of one core.
_REFRESH_S = 10.0
_REFRESH_SHARE = 0.03  # the most of the search's time that may go into it


class NotWritten(OSError):
    """Some files could not be written, all others were. `files` lists them with the reasons."""

    def __init__(self, files: list[str]) -> None:
        super().__init__("; ".join(files))
        self.files = files


def write_files(results: Results, width: int = 100) -> list[str]:
    """Writes the tables, summary.txt and report.html independently of each other.

    Returns those that could not be written, with the reason.
    """
    made = tables(results) | {
        results.run.report_html: lambda: report_page(results),
        results.run.summary_txt: lambda: summary(results, width),
    }
    failed = []
    for path, content in made.items():
        try:
            results.run.write_atomic(path, content())
        except OSError as error:
            failed.append(f"{path.name}: {error.strerror or error}")
    return failed


def write_all(run: RunDir, width: int = 100) -> str:
    """Writes all files that are made from a run's events. Returns the summary.

    Raises NotWritten, after writing the others, if some could not be written.
    """
    results = load(run)
    if failed := write_files(results, width):
        raise NotWritten(failed)
    return summary(results, width)


@contextmanager
def refreshed_in_background(run: RunDir) -> Iterator[None]:
    """Rebuilds tables and page in the background during a search, when trials have ended."""
    ended = threading.Event()

    def follow() -> None:
        seen = 0
        took = 0.0
        while not ended.wait(max(_REFRESH_S, took / _REFRESH_SHARE)):
            finished = sum(isinstance(event, TrialEnded) for event in read(run))
            if finished != seen:
                seen = finished
                began = time.monotonic()
                with suppress(OSError):  # such as a full disk, reported at the end of the search
                    write_all(run)
                took = time.monotonic() - began

    thread = threading.Thread(target=follow, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
