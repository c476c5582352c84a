"""From single runs to medians, ranges and the figures that the project is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pandas as pd

from benchmarks.arms import describe

Rows = Sequence[dict[str, Any]]


def summarise(rows: Rows) -> pd.DataFrame:
    """One row for each part, backbone, arm and round trip: medians and ranges over the repeats."""
    table = []
    frame = pd.DataFrame(rows)
    keys = ["part", "backbone", "arm", "round_trip_ms", "trials"]
    for key, group in frame.groupby(keys, sort=False):
        part, backbone, arm, round_trip_ms, trials = key
        rows_per_s, pss = group["rows_per_s"].dropna(), group["peak_pss_mb"].dropna()
        table.append(
            {
                "part": part,
                "backbone": backbone,
                "arm": arm,
                "what": "the default command" if arm == "F" else describe(arm),
                "round trip ms": round_trip_ms,
                "trials": trials,
                "runs": len(group),
                "seconds": round(group["seconds"].median(), 1),
                "least": round(group["seconds"].min(), 1),
                "most": round(group["seconds"].max(), 1),
                "whole s": round(group["whole_s"].median(), 1),
                "rows/s": round(rows_per_s.median(), 1) if len(rows_per_s) else None,
                "peak PSS MB": round(pss.median()) if len(pss) else None,
            }
        )
    return pd.DataFrame(table)


def headline(rows: Rows) -> list[tuple[str, float | None, str]]:
    """(figure, value or None where its runs are missing, aim)."""
    swarm, local = _Part(rows, "throughput", "swarm"), _Part(rows, "throughput", "local")
    stock = _Part(rows, "throughput", "stock")
    far = _Part([row for row in rows if row["round_trip_ms"]], "latency", "swarm")
    near = _Part([row for row in rows if not row["round_trip_ms"]], "latency", "swarm")
    found: list[tuple[str, Callable[[], float], str]] = [
        ("swarm: E at its best ÷ F, wall time", lambda: swarm.best("ER") / swarm.best("F"), "none"),
        ("swarm: E without reuse ÷ F", lambda: swarm.best("E") / swarm.best("F"), "none"),
        (
            "swarm: E at its best on Petals' own server ÷ F",
            lambda: stock.best("ER") / swarm.best("F"),
            "4.5",
        ),
        (
            "swarm: E without reuse on Petals' own server ÷ F",
            lambda: stock.best("E") / swarm.best("F"),
            "7",
        ),
        (
            "our server ÷ Petals' own, bare packed loop, seconds",
            lambda: swarm.best("A") / stock.best("A"),
            "0.55",
        ),
        (
            "swarm: E at its best ÷ A (the limit)",
            lambda: swarm.best("ER") / swarm.best("A"),
            "none",
        ),
        (
            "swarm: F's rows/s in steady state ÷ A's, 8 at once",
            lambda: swarm.rows_per_s("F8") / swarm.rows_per_s("A8"),
            "0.93",
        ),
        (
            "swarm: F's rows/s in steady state ÷ A's, 16 at once",
            lambda: swarm.rows_per_s("F16") / swarm.rows_per_s("A16"),
            "0.93",
        ),
        ("local: E at its best ÷ F", lambda: local.best("ER") / local.best("F"), "1.4"),
        ("local: E without reuse ÷ F", lambda: local.best("E") / local.best("F"), "none"),
        ("local: B ÷ F", lambda: local.best("B") / local.best("F"), "none"),
        (
            "100 ms round trip, 16 trials: F's throughput ÷ B's",
            lambda: far.seconds("B1") / far.seconds("F16"),
            "7",
        ),
        (
            "16 trials: packed throughput (F) at 100 ms ÷ at 0 ms",
            lambda: near.seconds("F16") / far.seconds("F16"),
            "0.7",
        ),
    ]
    for backbone, aim in (("swarm", "60"), ("local", "none")):
        memory = _Part(rows, "memory", backbone)
        found += [
            (f"{backbone}: MB for each further trial, F", lambda m=memory: m.added("F"), aim),
            (
                f"{backbone}: MB for each further trial, F ÷ E",
                lambda m=memory: m.added("F") / m.added("E"),
                "none",
            ),
        ]
    trivial = {row["trials"]: row["seconds"] for row in rows if row["part"] == "overhead"}
    found += [
        ("ms per trivial trial, 100 of them", lambda: 10 * trivial[100], "50"),
        ("ms per trivial trial, 1,000 of them", lambda: trivial[1000], "1.1 times that"),
        ("default command, s", lambda: _Part(rows, "default", "swarm").seconds("F"), "90"),
        (
            "default command with --backbone local, s",
            lambda: _Part(rows, "default", "local").seconds("F"),
            "60",
        ),
    ]
    return [(name, _known(value), aim) for name, value, aim in found]


def _known(value: Callable[[], float]) -> float | None:
    try:
        return value()
    except (KeyError, ValueError):
        return None  # an arm that was not run, or never ran in steady state


class _Part:
    """Medians over the runs of one part on one backbone. Methods raise where there are none."""

    def __init__(self, rows: Rows, part: str, backbone: str) -> None:
        self._by_arm: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["part"] == part and row["backbone"] == backbone:
                self._by_arm.setdefault(row["arm"], []).append(row)

    def seconds(self, arm: str) -> float:
        return median(row["seconds"] for row in self._by_arm[arm])

    def rows_per_s(self, arm: str) -> float:
        rates = [row["rows_per_s"] for row in self._by_arm[arm]]
        return median(rate for rate in rates if rate is not None)

    def best(self, kinds: str) -> float:
        """Seconds of the fastest arm of these kinds, whatever runs at once in it."""
        return min(self.seconds(arm) for arm in self._by_arm if arm[0] in kinds)

    def added(self, kind: str) -> float:
        """Memory in MB that one more trial takes, from 2 to 8 at once."""
        few, many = (self._by_arm[f"{kind}{n}"][0]["peak_pss_mb"] for n in (2, 8))
        return float(many - few) / 6


def markdown(
    table: pd.DataFrame, figures: list[tuple[str, float | None, str]], about: dict[str, str]
) -> str:
    """The results as a page."""
    lines = ["# Search throughput", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| figure | measured | aim |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {value:.3g} | {aim} |" for name, value, aim in figures if value is not None
    ]
    heads = list(table.columns)
    lines += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in table.itertuples(index=False):
        cells = [
            "" if pd.isna(cell) else f"{cell:g}" if _is_float(cell) else str(cell) for cell in row
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_float(cell: Any) -> bool:
    return isinstance(cell, float)
