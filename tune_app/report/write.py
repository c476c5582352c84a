"""Writes all that is made from a run's events, once or again and again while a search runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tune_app.report.page.page import write_report
from tune_app.report.summary import summary
from tune_app.report.tables import write_tables
from tune_app.run.events import TrialEnded, read
from tune_app.run.run_dir import RunDir

# How often the page of a running search is rebuilt at most; it takes half a second of one core.
_REFRESH_S = 10.0
_REFRESH_SHARE = 0.03  # of the search's time that goes into it at most


def write_all(run: RunDir, width: int = 100) -> str:
    """Writes the tables, summary.txt and report.html of a run; returns the summary."""
    results = write_tables(run)
    write_report(run)
    text = summary(results, width)
    run.write_atomic(run.summary_txt, text)
    return text


@contextmanager
def kept_fresh(run: RunDir) -> Iterator[None]:
    """Rebuilds tables and page in the background while a search runs, after finished trials."""
    ended = threading.Event()

    def follow() -> None:
        seen = 0
        took = 0.0
        while not ended.wait(max(_REFRESH_S, took / _REFRESH_SHARE)):
            finished = sum(isinstance(event, TrialEnded) for event in read(run))
            if finished != seen:
                seen = finished
                began = time.monotonic()
                write_all(run)
                took = time.monotonic() - began

    thread = threading.Thread(target=follow, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
