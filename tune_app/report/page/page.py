"""The report: one self-contained HTML file that works from disk and without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tune_app.report.confirmation import Evidence
from tune_app.report.importance import importance, why_none
from tune_app.report.page import plots as draw
from tune_app.report.page.parallel import parallel
from tune_app.report.page.render import render
from tune_app.report.results import Results
from tune_app.report.summary import by_scheduler, confirmed_name, reproduce
from tune_app.report.tables import best_yaml
from tune_app.report.verdict import verdict
from tune_app.report.words import (
    MINUS,
    baseline_name,
    changes_by_step,
    count,
    duration,
    exported,
    notes,
    number,
    plural,
    sampled_values,
    signed,
    standing,
    state,
    with_spread,
)
from tune_app.run.passwords import without_passwords
from tune_app.run.run_dir import Status

_TABLE_FIRST = ["trial", "status", "eval_loss"]
_TABLE_LAST = ["step", "train_loss", "tokens", "seconds", "reason"]


def report_page(results: Results) -> str:
    """The page of one run as a string of HTML."""
    table = importance(results)
    over = [
        draw.losses_over(results, name, legend=position == 0)
        for position, name in enumerate(results.sampled)
        if results.searched[name].dropna().nunique() > 1
    ]
    shown = [
        draw.differences(results),
        draw.importances(table),
        parallel(results),
        draw.curves(results),
        draw.progress([("best so far", results)]),
        *over,
    ]
    best = results.best
    winner = None if best is None else int(best["trial"])
    return render(
        "report.html.j2",
        [plot for plot in shown if plot],
        running=results.running,
        hover=hover_texts([results])[0],
        title=f"{results.run.path.name} \N{MIDDLE DOT} hyperparameter search",
        results=results,
        settings=results.settings,
        state=state(results),
        verdict=verdict(results),
        winner=winner,
        default_won=winner in results.baselines,
        notes=notes(results),
        best_values=_best_values(results),
        tiles=_tiles(results),
        exported=exported(results),
        confirm=_confirm_rows(results),
        over=[plot["id"] for plot in over if plot],
        too_few=why_none(results) if table.empty else "",
        schedulers=by_scheduler(results),
        cost=_cost(results),
        hosts=results.hosts,
        table=trial_table(results),
        best_yaml=None if winner is None else without_passwords(best_yaml(results, winner)),
        reproduce=reproduce(results),
    )


def hover_texts(several: Sequence[Results]) -> list[dict[str, str]]:
    """For each run: trial number -> the hover text of its points. Plotly reads it as HTML."""
    return [
        {
            str(row["trial"]): "<br>".join(
                html.escape(line)
                for line in (
                    f"trial {row['trial']} ({row['status']})",
                    f"loss {number(row['eval_loss'], 'loss')}, "
                    f"{results.metric} {number(row.get(results.metric), results.metric)}",
                    *sampled_values(row, results).split(", "),
                )
            )
            for _, row in results.trials.iterrows()
        }
        for results in several
    ]


def trial_table(results: Results) -> dict[str, Any]:
    """Columns and rows of the table of all trials: (text, value to sort by) for each cell."""
    trials = results.trials
    test = [name for name in ("test_loss", f"test_{results.metric}") if name in trials]
    names = [*_TABLE_FIRST, results.metric, *results.sampled, *test, *_TABLE_LAST]
    names = [name for name in names if name in trials and not trials[name].isna().all()]
    columns = [_cells(trials[name], name) for name in names]
    numeric = [all(isinstance(sort, float) for _, sort in column) for column in columns]
    return {
        "names": names,
        "titles": [{"eval_loss": "loss", "seconds": "time"}.get(name, name) for name in names],
        "numeric": numeric,
        "rows": list(zip(*columns, strict=True)) if columns else [],
        "kinds": [
            "confirm" if origin == "confirm" else str(status)
            for origin, status in zip(trials["origin"], trials["status"], strict=True)
        ],
        "statuses": [str(status) for status in results.counts],
    }


def _cells(values: pd.Series, name: str) -> list[tuple[str, float | str]]:
    cells: list[tuple[str, float | str]] = []
    for value in values:
        if isinstance(value, str):
            cells.append((value, value))
            continue
        sort = math.inf if pd.isna(value) else float(value)
        cells.append((duration(sort) if name == "seconds" else number(value, name), sort))
    return cells


def _best_values(results: Results) -> list[tuple[str, str]]:
    best = results.best
    if best is None:
        return []
    pairs = ((name, best[name]) for name in results.sampled)
    values = [(name, number(value, name)) for name, value in pairs if pd.notna(value)]
    return values + changes_by_step(results.changes(int(best["trial"])))


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """(title, value, remark) of the numbers that belong to the answer."""
    of = f"of {results.planned} planned" if results.planned else ""
    trials = ("trials", str(len(results.searched)), standing(results) or of)
    if results.evidence is not None:
        return [*_confirmed_tiles(results, results.evidence), trials]
    best, default = results.best, results.default
    objective, second = results.objective, results.second_metric
    tiles = []
    titled = [] if default is None else [(baseline_name(int(default["trial"])), default)]
    if best is not None and best["trial"] not in results.baselines:
        titled.insert(0, (f"trial {best['trial']}", best))
    for title, row in titled:
        if pd.notna(row[objective.column]):
            value = row.get("eval_loss" if second == "loss" else second)
            remark = f"{second} {number(value, second)}, one seed"
            value = number(row[objective.column], objective.name)
            tiles.append((f"{title}, validation {objective.name}", value, remark))
    if len(tiles) == 2 and best is not None and default is not None:
        change = float(best[objective.column] - default[objective.column])
        share = "" if objective.higher_is_better else f"{change / default[objective.column]:+.1%}"
        tiles.append(("difference", signed(change), share.replace("-", MINUS)))
    return [*tiles, trials]


def _confirmed_tiles(results: Results, evidence: Evidence) -> list[tuple[str, str, str]]:
    """The tiles of a confirmation; the search's own numbers, with one seed each, are partly
    luck."""
    tiles, rows = [], results.confirm.set_index("trial")
    name, second = results.objective.name, results.second_metric
    for trial in (evidence.trial, evidence.baseline):
        row = rows.loc[trial]
        title = f"trial {trial}" if trial == evidence.trial else baseline_name(trial)
        remark = f"{plural(row['seeds'], 'seed')}, {second} {number(row['metric'], second)}"
        spread = "" if pd.isna(row["spread"]) else f"\N{PLUS-MINUS SIGN} {row['spread']:.3f}, "
        value = number(row["mean"], name)
        tiles.append((f"{title}, {row['split']} {name}", value, spread + remark))
    best = rows.loc[evidence.trial]
    remark = "one pair of runs"
    if pd.notna(best["low"]):
        remark = f"95% interval {signed(best['low'])} to {signed(best['high'])}"
    return [*tiles, ("difference", signed(best["difference"]), remark)]


def _confirm_rows(results: Results) -> list[list[str]]:
    rows = []
    for row in results.confirm.itertuples():
        interval = "" if pd.isna(row.low) else f"{signed(row.low)} to {signed(row.high)}"
        rows.append(
            [
                confirmed_name(row.part, row.trial),
                f"{row.seeds}" + (f", {row.failed} failed" if row.failed else ""),
                number(row.valid, results.objective.name),
                with_spread(row.mean, row.spread, results.objective.name),
                number(row.metric, results.second_metric),
                "" if pd.isna(row.difference) else signed(row.difference),
                interval,
            ]
        )
    return rows


def _cost(results: Results) -> list[tuple[str, str]]:
    tokens = float(results.trials["tokens"].sum())
    cost = [("wall time", duration(results.seconds)), ("tokens", count(tokens))]
    if results.seconds > 0 and tokens:
        cost.append(("tokens per second", count(tokens / results.seconds)))
    if results.hosts:
        full = [host.occupancy for host in results.hosts if host.packs]
        if full:
            cost.append(("packs filled", f"{sum(full) / len(full):.0%}"))
        if results.settings.get("backbone") != "local":
            cost.append(("requests", f"{sum(host.requests for host in results.hosts):,}"))
            cost.append(("retries", f"{sum(host.retries for host in results.hosts):,}"))
        waited = max(host.wait_s for host in results.hosts)  # they wait concurrently
        cost.append(("waiting for the backbone", duration(waited)))
    stopped = results.counts.get(Status.STOPPED, 0)
    if stopped:
        cost.append(("stopped early", plural(stopped, "trial")))
    return cost
