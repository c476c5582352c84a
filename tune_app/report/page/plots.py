"""Plotly figures of a run as plain JSON: data and layout, without a theme's colours.

A colour that starts with `--` names a CSS variable of the page, which `page.js` looks up when it
draws, so that they follow light and dark mode. Points have the trial's number as `customdata`,
which the page turns into the hover text. Trials share a few traces, because a separate trace for
each of 1,000 trials would make the page slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from tune_app.report.results import Results
from tune_app.report.words import LOGARITHMIC, number, plural
from tune_app.run.run_dir import Status

Plot = dict[str, Any]  # id, data, layout, caption, label (for screen readers)

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "pentagon", "hexagon", "cross")
POINT = "%{text}<extra></extra>"  # hover: the text that page.js puts in


def plot(name: str, data: list[Any], label: str, caption: str = "", **layout: Any) -> Plot:
    return {"id": name, "data": data, "layout": layout, "label": label, "caption": caption}


def shade(index: int) -> str:
    """The colour of the n-th category."""
    return f"--c{index % 8}"


def losses_over(results: Results, name: str, legend: bool = False) -> Plot | None:
    """Final loss against one hyperparameter, coloured by scheduler; diverged trials at the top.

    Categories are listed vertically, because their names are long.
    """
    trials = results.searched
    if name not in trials or trials[name].notna().sum() == 0:
        return None
    axis = _axis(trials[name], name)
    if (zero := axis.pop("zero", None)) is not None:
        trials = trials.assign(**{name: trials[name].mask(trials[name].eq(0), zero)})
    kinds = _categories(results, "scheduler")
    shown = trials[trials["eval_loss"].notna() & ~trials["status"].eq(Status.DIVERGED)]
    low, high, above = axis_range(shown["eval_loss"])
    data = []
    for index, kind in enumerate(kinds or [None]):
        rows = shown if kind is None else shown[shown["scheduler"] == kind]
        rows = rows[rows[name].notna()]
        if not rows.empty:
            data.append(_points(rows, name, kind or "trials", shade(index), SYMBOLS[index % 8]))
    lost = trials[trials["status"].eq(Status.DIVERGED) & trials[name].notna()]
    if not lost.empty:
        trace = _points(lost, name, "diverged", "--bad", "x-thin-open")
        data.append(trace | {"y": [high] * len(lost), "cliponaxis": False})
    default = shown[shown["trial"].eq(0) & shown[name].notna()]
    if not default.empty:
        ring = _points(default, name, "documented default", "--text", "circle-open")
        ring["marker"] |= {"size": 16, "line": {"width": 2}}
        data.append(ring)
    if not data:
        return None
    losses = {
        "title": {"text": "validation loss"},
        "range": [low, high],
        "showticklabels": not shown.empty,  # if all diverged, the height means nothing
    }
    axes = {"xaxis": axis, "yaxis": losses}
    if axis.get("type") == "category":
        axes = {"xaxis": losses, "yaxis": {**axis, "title": {"text": ""}}}
        for trace in data:
            trace["x"], trace["y"] = trace["y"], trace["x"]
    return plot(
        f"over-{name}",
        data,
        f"Final validation loss against {name}",
        f"{plural(above, 'trial')} above the visible range; double-click to see all."
        if legend and above
        else "",
        **axes,
        showlegend=legend and len(data) > 1,
    )


def curves(results: Results) -> Plot | None:
    """The validation loss of every trial over its steps; how a trial ended marks its last point."""
    history = _comparable(results.history[results.history["eval_loss"].notna()])
    searched = results.searched.set_index("trial")
    history = history[history["trial"].isin(searched.index)]
    if history.empty:
        return None
    best = None if results.best is None else int(results.best["trial"])
    groups = [
        (Status.STOPPED, "stopped early", "--faint", "line-ns-open", 0.7),
        (Status.FAILED, "failed", "--warn", "square-open", 0.7),
        (Status.INTERRUPTED, "interrupted", "--muted", "circle-open", 0.7),
        (Status.RUNNING, "running", "--c2", "circle-open", 0.8),
        (Status.DIVERGED, "diverged", "--bad", "x-thin-open", 0.7),
        (Status.FINISHED, "finished", "--c0", None, 0.65),
    ]
    crowd = min(1.0, (60 / len(searched)) ** 0.5)
    data: list[dict[str, Any]] = []
    by_trial = dict(list(history.groupby("trial")))
    for status, name, colour, symbol, opacity in groups:
        members = [t for t in by_trial if searched.loc[t, "status"] == status]
        members = [t for t in members if t not in (0, best)]
        if members:
            line = _lines([by_trial[t] for t in members], name, colour, opacity * crowd)
            data.append(line | {"showlegend": symbol is None})
        if members and symbol:
            data.append(_ends([by_trial[t].tail(1) for t in members], name, colour, symbol))
    for trial, name, colour in ((0, "documented default", "--text"), (best, "best", "--accent")):
        if trial in by_trial and (trial != 0 or best != 0 or name == "best"):
            line = _lines([by_trial[trial]], name, colour, 1.0)
            line["line"] = {"color": colour, "width": 3, "dash": "dot" if trial == 0 else "solid"}
            data.append(line)
    low, high, _ = axis_range(history["eval_loss"], reach=0.97)
    return plot(
        "curves",
        data,
        "Validation loss of every trial over its training steps",
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "validation loss"}, "range": [low, high]},
        showlegend=True,
    )


def _comparable(history: pd.DataFrame) -> pd.DataFrame:
    """The history with all losses as over all rows that trials are compared on.

    A loss over the few rows of an evaluation that decided nothing is moved by what the trial's
    evaluations over all rows differ from their first few. A trial without one is left as it is.
    """
    if "glimpse_loss" not in history:
        return history
    whole = history["eval_rows"] == history["eval_rows"].max()
    offsets = (history["eval_loss"] - history["glimpse_loss"]).where(whole)
    moved = history["eval_loss"] + offsets.groupby(history["trial"]).transform("mean")
    return history.assign(eval_loss=history["eval_loss"].where(whole | moved.isna(), moved))


def importances(table: pd.DataFrame) -> Plot | None:
    """Bars of PED-ANOVA importance, the greatest on top."""
    if table.empty:
        return None
    rows = table.iloc[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": rows["importance"].to_list(),
        "y": rows["parameter"].to_list(),
        "text": ["< 1%" if value < 0.01 else f"{value:.0%}" for value in rows["importance"]],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "--accent"},
        "hovertemplate": "%{y}: %{x:.1%} (%{customdata} trials)<extra></extra>",
        "customdata": [str(trials) for trials in rows["trials"]],
    }
    least = int(table["trials"].min())
    most = int(table["trials"].max())
    rests = str(most) if least == most else f"{least} to {most}"
    return plot(
        "importance",
        [bars],
        "Importance of each hyperparameter",
        f"PED-ANOVA: how much the best quarter of trials differs from all trials in a "
        f"hyperparameter. Based on {rests} trials each.",
        xaxis={"visible": False, "range": [0, float(table["importance"].max()) * 1.15]},
        yaxis={"showgrid": False, "fixedrange": True, "ticks": ""},
        height=60 + 34 * len(rows),
    )


def differences(results: Results) -> Plot | None:
    """The confirmation: paired difference from the default with its 95% interval."""
    rows = results.confirm[results.confirm["difference"].notna()]
    if rows.empty:
        return None
    rows = rows.iloc[::-1]
    half = (rows["high"] - rows["difference"]).fillna(0.0).to_list()
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": rows["difference"].to_list(),
        "y": [f"trial {trial}" for trial in rows["trial"]],
        "customdata": rows["trial"].to_list(),
        "error_x": {"type": "data", "array": half, "thickness": 2, "width": 6, "color": "--accent"},
        "marker": {"color": "--accent", "size": 11},
        "hovertemplate": POINT,
        "showlegend": False,
    }
    ends = [*rows["low"].dropna(), *rows["high"].dropna(), *rows["difference"], 0.0]
    pad = 0.12 * (max(ends) - min(ends) or 1.0)
    return plot(
        "confirmation",
        [points],
        f"Paired difference of the {results.objective.name} from the default",
        f"{'Right' if results.objective.higher_is_better else 'Left'} of the line is better than "
        "the default. The bar is the 95% interval over seeds and test rows.",
        xaxis={
            "title": {"text": f"{results.objective.name}, difference from the default"},
            "range": [min(ends) - pad, max(ends) + pad],
        },
        yaxis={"showgrid": False, "fixedrange": True, "range": [-0.5, len(rows) - 0.5]},
        shapes=[
            {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1}
            | {"line": {"color": "--text", "width": 2, "dash": "dot"}}
        ],
        height=110 + 40 * len(rows),
    )


def progress(runs: Iterable[tuple[str, Results]]) -> Plot | None:
    """The lowest final loss found so far against the tokens that the search has spent."""
    data = []
    for index, (name, results) in enumerate(runs):
        history = results.history.sort_values("time")
        spent = history.groupby("trial")["tokens"].diff().fillna(history["tokens"]).astype(float)
        tokens = spent.cumsum()
        last = history.groupby("trial").tail(1).index
        finals = results.finished.set_index("trial")["eval_loss"]
        ends = history.loc[history.index.isin(last) & history["trial"].isin(finals.index)]
        if ends.empty:
            continue
        best = finals.loc[ends["trial"]].cummin().to_list()
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [*tokens.loc[ends.index], float(tokens.iloc[-1])],
                "y": [*best, best[-1]],
                "line": {"shape": "hv", "color": shade(index), "width": 2.5},
                "hovertemplate": "loss %{y:.3f} after %{x:.3s} tokens",
            }
        )
    if not data:
        return None
    return plot(
        "progress",
        data,
        "Lowest final loss found so far against tokens spent",
        xaxis={"title": {"text": "tokens spent"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "best loss so far"}},
        showlegend=len(data) > 1,
    )


def _points(rows: pd.DataFrame, name: str, title: str, colour: str, symbol: str) -> dict[str, Any]:
    marker = {
        "color": colour,
        "symbol": symbol,
        "size": 9 if len(rows) < 200 else 6,
        "opacity": 0.85,
        "line": {"width": 1.6 if symbol.endswith("open") else 0},
    }
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "x": rows[name].to_list(),
        "y": rows["eval_loss"].to_list(),
        "customdata": rows["trial"].to_list(),
        "marker": marker,
        "hovertemplate": POINT,
    }


def _lines(parts: list[pd.DataFrame], name: str, colour: str, opacity: float) -> dict[str, Any]:
    """Many curves as one trace, with gaps between them."""
    x: list[Any] = []
    y: list[Any] = []
    ids: list[Any] = []
    for part in parts:
        x += [*part["step"].astype(int), None]
        y += [*part["eval_loss"], None]
        ids += [*part["trial"], None]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "customdata": ids,
        "line": {"color": colour, "width": 1.4},
        "opacity": opacity,
        "legendgroup": name,
        "hovertemplate": "%{text}<br>step %{x}: %{y:.3f}<extra></extra>",
    }


def _ends(parts: list[pd.DataFrame], name: str, colour: str, symbol: str) -> dict[str, Any]:
    """The last points of curves, marked; the line itself only shows in the legend."""
    mark = {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2, "color": colour}}
    trace = _lines(parts, name, colour, 1.0)
    return trace | {"mode": "lines+markers", "marker": mark, "hovertemplate": POINT}


def axis_range(losses: pd.Series, reach: float = 0.9) -> tuple[float, float, int]:
    """The range of losses to show: (low, high, number of losses above).

    One trial with a loss of 17 must not flatten all others: everything up to the quantile `reach`
    is visible, and the rest stays in the data.
    """
    if losses.empty:
        return 0.0, 1.0, 0
    low, top = float(losses.min()), float(losses.max())
    usual = float(losses.quantile(reach, interpolation="higher"))
    high = top if top - low < 2.5 * (usual - low) else usual
    pad = 0.06 * (high - low) or 0.05
    return low - pad, high + pad, int((losses > high + pad).sum())


def _categories(results: Results, name: str) -> list[str]:
    trials = results.searched
    return sorted(trials[name].dropna().unique()) if name in trials else []


def is_log(values: pd.Series, name: str) -> bool:
    positive = pd.to_numeric(values, errors="coerce").dropna()
    positive = positive[positive > 0]
    return name in LOGARITHMIC and len(positive) > 0 and positive.max() > 10 * positive.min()


def _axis(values: pd.Series, name: str) -> dict[str, Any]:
    """Plotly's axis of a hyperparameter; on a log one, `zero` is where a zero is drawn."""
    axis: dict[str, Any] = {"title": {"text": name}, "exponentformat": "e"}
    if is_log(values, name):
        numbers = pd.to_numeric(values, errors="coerce")
        low = math.floor(math.log10(numbers[numbers > 0].min()))
        ticks = {
            10.0**k: number(10.0**k, name)
            for k in range(low, 1 + math.ceil(math.log10(numbers.max())))
        }
        zero = 10.0 ** (low - 1)
        if numbers.eq(0).any():
            ticks = {zero: "0", **ticks}
        axis |= {"tickvals": list(ticks), "ticktext": list(ticks.values())}
        return axis | {"type": "log", "zero": zero}
    if any(isinstance(value, str | bool) for value in values.dropna()):
        return {"type": "category"}
    return axis
