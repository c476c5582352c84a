"""Parallel coordinates: a line for each trial through its values, shaded by loss."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from tune_app.report.page.plots import POINT, Plot, axis_range, is_log, plot
from tune_app.report.results import Results
from tune_app.report.words import number

_BINS = 7  # shades of loss
_LONGEST = 17  # characters of a label; the next axis is not far


def parallel(results: Results) -> Plot | None:
    """Parallel coordinates: a line for each trial through its values, shaded by loss."""
    rows = results.searched
    rows = rows[rows["eval_loss"].notna()].sort_values("eval_loss", ascending=False)
    names = [name for name in results.sampled if rows[name].dropna().nunique() > 1]
    if len(rows) < 2 or len(names) < 2:
        return None
    axes = [_scale(rows[name], name) for name in names]
    axes.append(_loss_scale(rows["eval_loss"]))
    heights = [axis["heights"] for axis in axes]
    rank = rows["eval_loss"].rank(method="first", ascending=False)
    bins = ((rank - 1) * _BINS // len(rows)).astype(int).to_list()  # 0: the worst, drawn first
    crowd = min(1.0, (100 / len(rows)) ** 0.5)
    data = []
    for shade_index in range(_BINS):
        x: list[float | None] = []
        y: list[float | None] = []
        ids: list[int | None] = []
        for position, trial in enumerate(rows["trial"]):
            if bins[position] == shade_index:
                x += [*range(len(axes)), None]
                y += [*(axis[position] for axis in heights), None]
                ids += [int(trial)] * len(axes) + [None]
        line = {
            "color": f"--s{shade_index}",
            "width": 2 if shade_index == _BINS - 1 and crowd == 1 else 1,
        }
        trace = {"x": x, "y": y, "customdata": ids, "type": "scatter", "mode": "lines"}
        trace |= {"line": line, "hovertemplate": POINT, "showlegend": False}
        data.append(trace | {"opacity": (0.3 + 0.6 * shade_index / (_BINS - 1)) * crowd})
    labels = [
        {"x": i, "y": y, "text": _short(text), "showarrow": False, "xanchor": "left", "xshift": 5}
        | {"font": {"size": 11}, "bgcolor": "--veil", "borderpad": 1}
        for i, axis in enumerate(axes)
        for y, text in axis["ticks"]
    ]
    lines = [
        {"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1, "line": {"color": "--muted"}}
        for i in range(len(axes))
    ]
    return plot(
        "parallel",
        data,
        "Parallel coordinates: every trial as a line through its hyperparameters to its loss",
        "Each line is a trial; the stronger its colour, the lower its loss.",
        xaxis={
            "tickvals": list(range(len(axes))),
            "ticktext": [*names, "loss"],
            "range": [-0.1, len(axes) - 0.5],
            "showgrid": False,
            "fixedrange": True,
        },
        yaxis={"visible": False, "range": [-0.2, 1.06], "fixedrange": True},
        annotations=labels,
        shapes=lines,
        minimum_width=110 * len(axes),
    )


def _scale(values: pd.Series, name: str) -> dict[str, Any]:
    """One axis: heights in [0, 1] in row order, and labelled ticks.

    A value that a trial did not have (conditional, or zero on a log axis) is below the axis.
    """
    below = -0.12
    if any(isinstance(value, str | bool) for value in values.dropna()):
        kinds = sorted({str(value) for value in values.dropna()})
        place = {kind: i / max(1, len(kinds) - 1) for i, kind in enumerate(kinds)}
        heights = [below if pd.isna(value) else place[str(value)] for value in values]
        return {"heights": heights, "ticks": _missing([(y, k) for k, y in place.items()], heights)}
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    log = is_log(values, name)
    scaled = numbers.where(numbers > 0).map(math.log10, na_action="ignore") if log else numbers
    low, high = float(scaled.min()), float(scaled.max())
    span = high - low or 1.0
    heights = [below if pd.isna(v) else (v - low) / span for v in scaled]
    ends = [(0.0, low), (1.0, high)]
    ticks = [(y, number(10**value if log else value, name)) for y, value in ends]
    return {"heights": heights, "ticks": _missing(ticks, heights, "0" if log else "not set")}


def _loss_scale(losses: pd.Series) -> dict[str, Any]:
    """The axis of the loss: the best at the top, and all beyond the visible range at the bottom."""
    low, top = float(losses.min()), float(losses.max())
    high = min(top, axis_range(losses)[1])
    heights = [1 - (min(loss, high) - low) / (high - low or 1.0) for loss in losses]
    worst = number(high, "loss") + (" or more" if top > high else "")
    return {"heights": heights, "ticks": [(0.0, worst), (1.0, number(low, "loss"))]}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _missing(
    ticks: list[tuple[float, str]], heights: list[float], text: str = "not set"
) -> list[tuple[float, str]]:
    return [*ticks, (-0.12, text)] if min(heights) < 0 else ticks
