"""What a search shows while it runs: a live display in a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tune_app.report.words import changes_in_words, duration, number, plural, warm_start_in_words
from tune_app.run.event_log import read
from tune_app.run.events import (
    Event,
    PopulationChanged,
    SearchResumed,
    TrialEnded,
    TrialReported,
    TrialRetried,
    WarmStarted,
)
from tune_app.run.host_counters import HostCounters
from tune_app.run.passwords import without_passwords
from tune_app.run.run_dir import RunDir, Status
from tune_app.run.run_state import TrialState
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.search.progress import Progress
from tune_app.search.trial_job import seed_index_of
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.search.executor import Executor

_REFRESHES_PER_S = 4
_LABEL_WIDTH = 7  # of the two tables, one above the other
_COLOURS = {
    Status.FINISHED: "green",
    Status.STOPPED: "yellow",
    Status.DIVERGED: "magenta",
    Status.FAILED: "red",
    Status.RUNNING: "cyan",
}


class LiveView:
    """Listens to the search's events and shows them in the terminal.

    A thread of rich draws the picture that `listen` builds after each event. There is no lock:
    Ctrl-C may interrupt anything here, and its handler calls `say`.
    """

    def __init__(self, config: SearchConfig, run: RunDir, stream: TextIO | None = None) -> None:
        self._config, self._run = config, run
        self._progress = Progress(config)
        self._hosts: Sequence[HostCounters] = ()
        self._console = Console(file=stream or sys.stderr, highlight=False)
        # Logs of Ray and Petals would break a live display.
        self._is_live = (
            self._console.file.isatty()
            and not self._console.is_dumb_terminal
            and not (config.quiet or config.verbose)
        )
        self._picture: RenderableType = Text("")
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            transient=True,
            refresh_per_second=_REFRESHES_PER_S,
            redirect_stdout=sys.stdout.isatty(),  # not if the result is written to a file
        )

    def __enter__(self) -> LiveView:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Gives the terminal back."""
        self._live.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()  # Tune saves its callbacks, and this with them; a terminal cannot be

    def introduce(self, executor: Executor) -> None:
        """Says before the first trial where the results will be, and where to watch."""
        self.say(f"run directory: {self._run.path}")
        for line in executor.data.summary.in_words(task_named(self._config.task).metric):
            self.say(line)
        for note in executor.data.notes:
            self.say(f"note: {note}")
        if executor.dashboard:
            self.say(f"Ray dashboard: {executor.dashboard}  (its token: {token_command()})")
        self._picture = Text("waiting for the first trial ...")

    def say(self, text: str) -> None:
        """Prints a line above the live display."""
        if not self._config.quiet:
            self._console.print(without_passwords(text), markup=False, soft_wrap=True)

    def progress(self, text: str) -> None:
        """What is being waited for before the first trial."""
        if self._is_live:
            self._picture = Spinner("dots", f"{text} ...")
        else:
            self.say(f"{text} ...")

    def expect(self, runs: int) -> None:
        """A step of the confirmation starts, with this many runs."""
        self._progress.expect(runs)
        self._picture = self._pictured()

    def show_hosts(self, counters: Sequence[HostCounters]) -> None:
        """Shows the hosts' counters; may be called from any thread."""
        self._hosts = counters

    def listen(self, event: Event) -> None:
        if isinstance(event, SearchResumed):
            self._progress.replay(read(self._run))
        trial = self._progress.listen(event)
        if isinstance(event, WarmStarted):
            self.say(f"note: {warm_start_in_words(event)}")
        if isinstance(event, PopulationChanged) and not self._is_live:
            self._tell_changes(event)
        if trial is not None:
            self._tell(event, trial)
        self._picture = self._pictured()

    def _tell(self, event: Event, trial: TrialState) -> None:
        """Plain lines: for each trial that has ended, and for failures."""
        if isinstance(event, TrialRetried):
            self.say(f"{self._name(trial)} resumes from its last evaluation: {event.reason}")
        elif isinstance(event, TrialEnded) and not self._is_live:
            self.say(self._line(trial))
        elif isinstance(event, TrialEnded) and event.status == Status.FAILED:
            self.say(f"{self._name(trial)} failed: {event.reason}")
        elif isinstance(event, TrialReported) and self._config.verbose:
            self.say(f"{self._name(trial)}: step {trial.step}, {self._metrics(trial)}")

    def _tell_changes(self, event: PopulationChanged) -> None:
        for clone in event.changed:
            latest = [list(change) for change in clone.config.changes if change[0] == event.step]
            values = ", ".join(changes_in_words(latest))
            self.say(
                f"trial {clone.trial} continues as a clone of trial {clone.of} {values}".rstrip()
            )

    def _line(self, trial: TrialState) -> str:
        """`3/16  trial 2  finished  loss 1.966, accuracy 0.234  lr 1.4e-3, linear  9.8 s`"""
        progress = self._progress
        done, planned = progress.ended, self._config.trials
        if trial.of is not None:
            done, planned = len(progress.confirmed), progress.confirmations
        config = trial.config or TrialConfig()
        parts = [
            f"{done}/{planned}",
            self._name(trial),
            trial.status,
            self._metrics(trial),
            f"lr {number(config.lr, 'lr')}, {config.scheduler}",
            duration(math.nan if trial.last is None else trial.last.seconds),
        ]
        return "  ".join(parts) + (f"  ({trial.reason})" if trial.reason else "")

    def _name(self, trial: TrialState) -> str:
        if trial.of is None:
            return f"trial {trial.number}"
        return f"confirming {_confirmed(trial.of)}, seed {seed_index_of(trial.number)}"

    def _metrics(self, trial: TrialState) -> str:
        search = self._progress.run.search
        metric = "" if search is None else search.metric
        text = f"loss {number(trial.loss, 'loss')}"
        value = math.nan if trial.last is None else trial.last.metrics.get(metric, math.nan)
        if math.isfinite(value):
            text += f", {metric} {number(value, metric)}"
        return text

    # ------------------------------------------------------------------------------- in a terminal

    def _draw(self) -> RenderableType:
        """The picture, with the hosts' counters and the time, which change between events."""
        if isinstance(self._picture, Spinner | Text):
            return self._picture
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True, min_width=_LABEL_WIDTH)
        lines.add_column(overflow="ellipsis", no_wrap=True)
        for label, value in hosts_in_words(self._hosts):
            lines.add_row(label, value)
        left = self._progress.left_s()
        time_text = f"{duration(self._progress.elapsed_s())} so far"
        lines.add_row("time", time_text + ("" if not left else f", about {duration(left)} left"))
        return Group(self._picture, lines)

    def _pictured(self) -> RenderableType:
        progress = self._progress
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True, min_width=_LABEL_WIDTH)
        lines.add_column()
        if progress.confirmations:
            lines.add_row("confirm", self._bar(len(progress.confirmed), progress.confirmations))
            for of in dict.fromkeys(trial.of for trial in progress.running):
                seeds = sorted(seed_index_of(t.number) for t in progress.running if t.of == of)
                text = ", ".join(map(str, seeds))
                lines.add_row("", f"{_confirmed(of)}, seed{'s' * (len(seeds) > 1)} {text}")
        else:
            lines.add_row("trials", self._bar(progress.ended, self._config.trials))
        if progress.counts:
            lines.add_row("", self._counts())
        best = progress.best
        if best is None:
            lines.add_row("best", "no trial has finished yet")
        else:
            lines.add_row("best", f"trial {best.number}: {self._metrics(best)}")
            names = (progress.run.search and progress.run.search.sampled) or ("lr", "scheduler")
            values = [
                f"{name} {number(getattr(best.config, name), name)}"
                for name in names
                if getattr(best.config, name, None) is not None
            ]
            lines.add_row("", Text(", ".join(values), style="bold"))
        if progress.rungs:
            lines.add_row("rungs", self._rungs())
        return lines

    def _bar(self, done: int, planned: int) -> RenderableType:
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(max(planned, 1), done, width=30), f"{done} of {planned}")
        return bar

    def _counts(self) -> Text:
        counts = self._progress.counts.items()
        parts = [Text(f"{amount} {status}", _COLOURS[Status(status)]) for status, amount in counts]
        return Text("  ").join(parts)

    def _rungs(self) -> Table:
        """How many trials reached each evaluation, and their losses, which early stopping uses."""
        rungs = self._progress.rungs[-8:]  # as many as fit into 80 columns
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for _ in rungs:
            table.add_column(justify="right")
        table.add_row("step", *(str(rung.step) for rung in rungs))
        table.add_row("trials", *(str(rung.trials) for rung in rungs))
        table.add_row("best loss", *(number(rung.best_loss, "loss") for rung in rungs))
        table.add_row("median", *(number(rung.median_loss, "loss") for rung in rungs))
        return table


def _confirmed(of: int | None) -> str:
    return f"trial {of}" if of else "the default"


def hosts_in_words(counters: Sequence[HostCounters]) -> list[tuple[str, str]]:
    """The lines `speed` and `swarm` of the display, from `Executor.counters`."""
    working = [host for host in counters if host.packs]
    if not working:
        return []
    rows, tokens = (sum(h.rows_per_s for h in working), sum(h.tokens_per_s for h in working))
    full = sum(h.occupancy * h.packs for h in working) / sum(h.packs for h in working)
    hosts = f", {len(working)} hosts" if len(working) > 1 else ""
    lines = [("speed", f"{rows:.0f} rows/s, {tokens:,.0f} tokens/s, packs {full:.0%} full{hosts}")]
    swarm = [host for host in working if host.servers is not None]
    if swarm:
        # All hosts see the same swarm; the most cautious view counts.
        servers, served = (
            min(host.servers or 0 for host in swarm),
            min(host.blocks_served or 0 for host in swarm),
        )
        retries = sum(host.retries for host in swarm)
        lines.append(
            (
                "swarm",
                f"{plural(servers, 'server')}, {served} of {swarm[0].blocks} blocks served, "
                f"{retries} retried",
            )
        )
    return lines


def token_command() -> str:
    """The command that prints the dashboard's token, with the path of `ray` if it needs one."""
    ray = Path(sys.executable).with_name("ray")
    on_path = shutil.which("ray")
    found = on_path is not None and ray.exists() and Path(on_path).samefile(ray)
    return f"{'ray' if found else ray} get-auth-token"
