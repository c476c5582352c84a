"""The text that the terminal prints when a search has ended, and that is saved as summary.txt."""

from __future__ import annotations

import shlex
import textwrap

import pandas as pd

from tune_app.report.importance import importance, storage_url, why_none
from tune_app.report.results import Results
from tune_app.report.verdict import verdict
from tune_app.report.words import (
    DASH,
    baseline_name,
    changes_in_words,
    count,
    duration,
    exported,
    notes,
    number,
    plural,
    sampled_values,
    signed,
    standing,
)
from tune_app.run.passwords import without_passwords
from tune_app.run.run_dir import Status

MAX_ROWS = 30
_MAX_REASONS = 5
_BARS = 20  # characters of the longest importance bar


def summary(results: Results, width: int = 100) -> str:
    """The whole summary as text of at most `width` columns, without colours."""
    return f"{findings(results, width)}\n{files(results, width)}"


def findings(results: Results, width: int = 100) -> str:
    """The results: everything that does not depend on which files could be written."""
    parts = [
        _trials_table(results, width),
        _failures(results, width),
        _verdict(results, width),
        _confirmation(results, width),
        _by_scheduler(results),
        _importance(results, width),
        _cost(results, width),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def files(results: Results, width: int = 100) -> str:
    """The exported prompts' metrics, and files to open and commands to run."""
    parts = [textwrap.fill(exported(results), width), _files(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[list[str]], header: list[str], right: set[int]) -> list[str]:
    """Lines of a table; the columns in `right` are numbers and right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in [header, *rows]
    ]


def _trials_table(results: Results, width: int) -> str:
    trials = results.searched
    if trials.empty:
        return ""
    names = ["trial", "status", "eval_loss", results.metric, *results.sampled, "seconds"]
    titles = {"eval_loss": "loss", "seconds": "time"}
    shown = trials.head(MAX_ROWS)
    columns = {}
    for name in names:
        if name in shown:
            write = duration if name == "seconds" else lambda value, name=name: number(value, name)
            columns[titles.get(name, name)] = [write(value) for value in shown[name]]
    # Hyperparameters that do not fit are left to trials.csv, the last ones first.
    left_out: list[str] = []
    while sum(max(map(len, [k, *v])) + 2 for k, v in columns.items()) - 2 > width:
        fitting = [name for name in results.sampled if name in columns]
        if not fitting:
            break
        columns.pop(fitting[-1])
        left_out.insert(0, fitting[-1])
    words = {name for name in shown if any(isinstance(value, str) for value in shown[name])}
    right = {i for i, name in enumerate(columns) if name not in words}
    lines = _table([list(row) for row in zip(*columns.values(), strict=True)], list(columns), right)
    more = len(trials) - len(shown)
    if more:
        lines.append(f"… {more} more in {results.run.trials_csv.name}")
    if left_out:
        also = f"Also in {results.run.trials_csv.name}: {', '.join(left_out)}"
        lines += textwrap.wrap(also, width)
    return "\n".join(lines)


def _failures(results: Results, width: int) -> str:
    trials = results.trials
    # The rare and alarming ones first: in a wide search space many trials diverge.
    bad = pd.concat(
        trials[trials["status"] == status].sort_values("trial")
        for status in (Status.FAILED, Status.INTERRUPTED, Status.DIVERGED)
    )
    if bad.empty:
        return ""
    reasons = []
    for row in bad.itertuples():
        first = row.reason.splitlines()[0] if row.reason else ""
        reasons.append(f"Trial {row.trial} {row.status}" + (f": {first}" if first else ""))
    lines = [textwrap.shorten(text, max(width, 20), placeholder=" …") for text in reasons]
    if len(lines) > _MAX_REASONS:
        more = len(lines) - _MAX_REASONS
        lines[_MAX_REASONS:] = [f"… {more} more in {results.run.trials_csv.name}"]
    return "\n".join(lines)


def _verdict(results: Results, width: int) -> str:
    found = verdict(results)
    lines = [f"{found.headline}. {found.sentence}"]
    best = results.best
    if (
        best is not None
        and best["trial"] not in results.baselines
        and sampled_values(best, results)
    ):
        lines.append(f"Best config: {sampled_values(best, results)}")
        changes = changes_in_words(results.changes(int(best["trial"])))
        lines += [f"  {line}" for line in changes]
    lines += notes(results)
    # A path that is broken at hyphens cannot be copied.
    return "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines)


def _confirmation(results: Results, width: int) -> str:
    if results.confirm.empty:
        return ""
    name, second = results.objective.name, results.second_metric
    rows = [
        [
            confirmed_name(row.part, row.trial),
            str(row.seeds) + (f" ({row.failed} failed)" if row.failed else ""),
            number(row.valid, name),
            number(row.mean, name),
            DASH if pd.isna(row.spread) else f"{row.spread:.3f}",
            number(row.metric, second),
            _difference(row.difference, row.low, row.high),
        ]
        for row in results.confirm.itertuples()
    ]
    split = results.confirm["split"].iloc[0]
    header = ["confirmed", "seeds", f"valid {name}", f"{split} {name}", "±", second]
    header.append("vs. default")
    lines = _table(rows, header, right={2, 3, 4, 5})
    if max(map(len, lines)) > width:  # the metric is also in the sentence above
        lines = _table([row[:5] + row[6:] for row in rows], header[:5] + header[6:], {2, 3, 4})
    return "\n".join(line[:width] for line in lines)


def confirmed_name(part: str, trial: int) -> str:
    """A confirmed config in a table."""
    return baseline_name(trial, short=True) if part == "baseline" else f"trial {trial}"


def _difference(mean: float, low: float, high: float) -> str:
    if pd.isna(mean):
        return DASH
    return signed(mean) + ("" if pd.isna(low) else f" ({signed(low)} to {signed(high)})")


def by_scheduler(results: Results) -> pd.DataFrame:
    """Columns scheduler, trials, best, median (of the final loss of finished and stopped ones)."""
    trials = results.searched
    if trials.empty or "scheduler" not in trials or results.population:
        return pd.DataFrame(columns=["scheduler", "trials", "best", "median"])
    done = trials["status"].isin([Status.FINISHED, Status.STOPPED])
    grouped = trials.assign(loss=trials["eval_loss"].where(done)).groupby("scheduler")
    table = grouped.agg(
        trials=("trial", "size"), best=("loss", "min"), median=("loss", "median")
    ).reset_index()
    return table.sort_values("best", na_position="last", kind="stable", ignore_index=True)


def _by_scheduler(results: Results) -> str:
    table = by_scheduler(results)
    if len(table) < 2:
        return ""
    rows = [
        [row.scheduler, str(row.trials), number(row.best, "loss"), number(row.median, "loss")]
        for row in table.itertuples()
    ]
    return "\n".join(_table(rows, ["scheduler", "trials", "best", "median loss"], right={1, 2, 3}))


def _importance(results: Results, width: int) -> str:
    table = importance(results)
    if table.empty:
        few = why_none(results)
        return textwrap.fill(f"Hyperparameter importance: {few}.", width) if few else ""
    top = table["importance"].max()
    rows = [
        [
            row.parameter,
            f"{row.importance:.0%}",
            "█" * max(1, round(_BARS * row.importance / top)),
            plural(row.trials, "trial"),
        ]
        for row in table.itertuples()
    ]
    header = ["importance (PED-ANOVA)", "", "", "rests on"]
    return "\n".join(line[:width] for line in _table(rows, header, right={1}))


def host_lines(results: Results) -> list[str]:
    """A line for each trial host: pack occupancy, speed, requests, retries, time waiting."""
    lines = []
    for host in results.hosts:
        parts = [
            f"packs {host.occupancy:.0%} full",
            f"{count(host.rows_per_s)} rows/s",
            f"{count(host.tokens_per_s)} tokens/s",
        ]
        if host.requests:  # to a swarm
            parts.append(f"{host.requests:,} {'request' if host.requests == 1 else 'requests'}")
            parts.append(f"{host.retries:,} {'retry' if host.retries == 1 else 'retries'}")
        parts.append(f"{duration(host.wait_s)} waiting for the backbone")
        lines.append(f"{host.host}: {', '.join(parts) if host.packs else 'nothing computed'}")
    return lines


def _cost(results: Results, width: int) -> str:
    if results.trials.empty:
        return ""
    tokens = results.trials["tokens"].sum()
    trained = f"{standing(results)}; {count(float(tokens))} tokens in {duration(results.seconds)}."
    ended = [f"Ended: {results.reason}."] if results.reason else []
    lines = [f"{plural(len(results.searched), 'trial')}: {trained}", *ended, *host_lines(results)]
    return "\n".join(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)


def _files(results: Results) -> str:
    run = results.run
    made = [
        ("trials.csv", "every trial, all hyperparameters and metrics"),
        ("history.csv", "every report of every trial"),
        ("best.yaml", "the best config, for --config"),
        ("prompts", "the best trial's prompts"),
    ]
    files = [(name, what) for name, what in made if (run.path / name).exists()]
    lines = [f"In {run.path}:", *(f"  {name:<12} {what}" for name, what in files)]
    return "\n".join([*(lines if files else lines[:1]), *next_steps(results)])


def next_steps(results: Results) -> list[str]:
    """Files to open and commands that make sense now, one per line."""
    steps = [("Report", str(results.run.report_html)), *_dashboards(results)]
    steps += reproduce(results)
    longest = max(len(what) for what, _ in steps)
    return [f"{what + ':':<{longest + 1}} {command}" for what, command in steps]


def _dashboards(results: Results) -> list[tuple[str, str]]:
    """How to see the run in other programs; a password in a storage's URL is left out."""
    storage, settings = storage_url(results), results.settings
    steps = list[tuple[str, str]]()
    if storage:
        steps.append(("Study", shlex.join(["optuna-dashboard", without_passwords(storage)])))
    if results.run.ray.exists():
        steps.append(("Curves", shlex.join(["tensorboard", "--logdir", str(results.run.ray)])))
    if settings.get("mlflow"):
        uri = without_passwords(settings["mlflow"])
        steps.append(("MLflow", f"{uri}, experiment {results.run.path.name}"))
    if settings.get("wandb"):
        steps.append(("W&B", f"project {settings['wandb']}, group {results.run.path.name}"))
    return steps


def reproduce(results: Results) -> list[tuple[str, str]]:
    """(purpose, command) for everything that continues from this run."""
    path, steps = results.run.path, list[tuple[str, str]]()
    best = shlex.quote(str(path / "best.yaml"))
    if results.best is not None:
        steps.append(("Use the prompts", f"python -m tune_app.apply {shlex.quote(str(path))}"))
        steps.append(("Train it again", f"python -m tune_app.train --config {best}"))
    if not results.running:
        resume = f"python -m tune_app.search --resume {shlex.quote(str(path))}"
        if len(results.searched) < results.planned or Status.INTERRUPTED in results.counts:
            steps.append(("Continue", resume))
        elif not results.population:
            steps.append(("Add trials", f"{resume} --trials {2 * results.planned}"))
    return steps
