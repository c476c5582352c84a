"""A confirmation run's results on each row of the test split, in a small file.

A row holds the sums that an evaluation of that row alone would give: its loss, its number of
targets, and whatever else the task counts, by name. Most names occur in few rows (those of one
class, for example), so the file is sparse: a compressed npz of (row, name, value), a few kilobytes
for hundreds of rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

_MOST_GROUPS = 1000  # the jackknife leaves out one group at a time

Row = Mapping[str, float]


def packed(rows: Sequence[Row]) -> bytes:
    """The rows as the content of a file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    place = {name: i for i, name in enumerate(names)}
    entries = [(i, place[name], value) for i, row in enumerate(rows) for name, value in row.items()]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.array(names, dtype=np.str_),
        row=np.array([row for row, _, _ in entries], dtype=np.int32),
        name=np.array([name for _, name, _ in entries], dtype=np.int32),
        value=np.array([value for _, _, value in entries], dtype=np.float32),
    )
    return buffer.getvalue()


def read(path: Path) -> list[dict[str, float]] | None:
    """The rows of a file that `packed` made; None if it is missing or cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            rows: list[dict[str, float]] = []
            for row, name, value in zip(
                file["row"].tolist(), file["name"].tolist(), file["value"].tolist(), strict=True
            ):
                if row == len(rows):
                    rows.append({})
                rows[row][names[name]] = value
        return rows or None
    except Exception:  # of zipfile, zlib, numpy and the file system, whatever it is that is torn
        return None


def pseudo_values(rows: Sequence[Row], metric: Callable[[Row], float]) -> np.ndarray:
    """The jackknife's pseudo-values [G] of a metric over all rows: their mean is close to the
    metric, and their deviation shows how much it depends on the choice of rows.

    For a mean over rows they are the rows' own values. Beyond 1,000 rows, neighbours are left out
    together in G groups of equal size (the last may be smaller), which bounds the work and allows
    for neighbours that are related.
    """
    size = -(-len(rows) // _MOST_GROUPS)
    groups = [_sum(rows[start : start + size]) for start in range(0, len(rows), size)]
    total, count = _sum(groups), len(groups)
    if count < 2:
        return np.full(count, metric(total))
    without = [
        metric({name: value - group.get(name, 0.0) for name, value in total.items()})
        for group in groups
    ]
    return count * metric(total) - (count - 1) * np.array(without)


def _sum(rows: Sequence[Row]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total
