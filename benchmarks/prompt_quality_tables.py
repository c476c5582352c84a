"""The tables of `benchmarks.prompt_quality`, made of the runs that it has kept."""

from __future__ import annotations

import pandas as pd


def report(runs: pd.DataFrame) -> str:
    """The results as Markdown."""
    return runs.to_string()
