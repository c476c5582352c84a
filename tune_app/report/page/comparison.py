"""The page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from tune_app.report.page import plots as draw
from tune_app.report.page.render import render
from tune_app.report.results import Results
from tune_app.report.verdict import verdict
from tune_app.report.words import count, number, plural, standing, state, with_spread


def comparison_page(several: Sequence[Results]) -> str:
    """Several runs side by side as a string of HTML."""
    names = run_names(several)
    plot = draw.progress(zip(names, several, strict=True))
    configs = [
        {} if results.best is None else results.configs.get(int(results.best["trial"]), {})
        for results in several
    ]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    rows = [(key, values) for key, values in rows if any(value is not None for value in values)]
    return render(
        "comparison.html.j2",
        [plot] if plot else [],
        running=any(results.running for results in several),
        hover={},
        title=f"Comparison of {plural(len(several), 'search').replace('searchs', 'searches')}",
        runs=[
            {
                "name": name,
                "results": results,
                "verdict": verdict(results),
                "state": state(results),
                "settings": results.settings,
                "tokens": count(float(results.trials["tokens"].sum())),
                "standing": standing(results),
                "losses": [_losses(results, trial) for trial in _compared(results)],
            }
            for name, results in zip(names, several, strict=True)
        ],
        comparable=len({(r.task, r.settings.get("train"), r.metric) for r in several}) == 1,
        names=names,
        rows=[(key, values, len({str(v) for v in values}) > 1) for key, values in rows],
    )


def _compared(results: Results) -> tuple[int | None, int | None]:
    """The two configs that the answer is about: the best one and the default."""
    if results.evidence is not None:
        return results.evidence.trial, results.evidence.baseline
    rows = (results.best, results.default)
    best, default = (None if row is None else int(row["trial"]) for row in rows)
    return best, default


def _losses(results: Results, trial: int | None) -> str:
    """A trial's confirmed value with its spread, or that of the search's one seed."""
    name = results.objective.name
    rows = results.confirm[results.confirm["trial"] == trial]
    if not rows.empty and pd.notna(rows.iloc[0]["mean"]):
        row = rows.iloc[0]
        return f"{with_spread(row['mean'], row['spread'], name)}, {row['split']}"
    row = None if trial is None else results.trial(trial)
    return number(None if row is None else row[results.objective.column], name)


def run_names(several: Sequence[Results]) -> list[str]:
    """The folders' names, with as many parents as needed to distinguish them."""
    paths = [results.run.path.parts for results in several]
    depth = 1
    while depth < max(map(len, paths)) and len({p[-depth:] for p in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]
