"""Figures of a running search at Ray's metrics endpoint, from where Prometheus and Grafana, and
through them the Ray dashboard, take them. Ray puts `ray_` before each name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Gauge

from tune_app.run.events import Event, TrialReported
from tune_app.search.ray_tune.cluster import Cluster

_POLL_S = 3.0

_LOSS = Gauge(
    "tune_app_eval_loss", "Evaluation loss of a trial's last report, nats", tag_keys=("trial",)
)
# Key of a host's counters -> its gauge.
_HOST = {
    "rows_per_s": Gauge(
        "tune_app_rows_per_second", "Rows a host computes in a second", tag_keys=("host",)
    ),
    "occupancy": Gauge(
        "tune_app_pack_occupancy", "Rows in a host's packs of those that fit", tag_keys=("host",)
    ),
    "retries": Gauge(
        "tune_app_swarm_retries", "Requests to servers that failed so far", tag_keys=("host",)
    ),
}


def export_event(event: Event) -> None:
    """Exports the loss of a report that has one; other events pass."""
    if isinstance(event, TrialReported) and math.isfinite(event.report.eval_loss):
        _LOSS.set(event.report.eval_loss, {"trial": str(event.trial)})


def export_hosts(counters: list[dict[str, Any]]) -> None:
    """Exports what `Cluster.counters` gives; a host that has done nothing yet has no figures."""
    for host in counters:
        for key, gauge in _HOST.items():
            if key in host:
                gauge.set(float(host[key]), {"host": host["host"]})


@contextmanager
def hosts_watched(
    machines: Cluster, show: Callable[[list[dict[str, Any]]], None]
) -> Iterator[None]:
    """Every few seconds the hosts' counters are exported and shown, until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            try:
                counters = machines.counters()
            except Exception:  # Ray is being shut down, or has died: the search says so itself
                return
            export_hosts(counters)
            show(counters)

    thread = threading.Thread(target=watch, name="hosts-watched", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=1)
