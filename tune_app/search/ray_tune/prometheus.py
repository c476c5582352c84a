"""Metrics of a running search at Ray's endpoint for Prometheus; Grafana and Ray's dashboard show
them from there. Ray adds the prefix `ray_` to each name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.util.metrics import Gauge

from tune_app.run.events import Event, TrialReported
from tune_app.run.host_counters import HostCounters
from tune_app.search.ray_tune.cluster import Cluster

_POLL_S = 3.0

_LOSS = Gauge(
    "tune_app_eval_loss", "Evaluation loss of a trial's last report, nats", tag_keys=("trial",)
)
# Field of HostCounters -> its gauge.
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
    """Exports the loss of a report; ignores other events."""
    if isinstance(event, TrialReported) and math.isfinite(event.report.eval_loss):
        _LOSS.set(event.report.eval_loss, {"trial": str(event.trial)})


def export_hosts(counters: list[HostCounters]) -> None:
    """Exports `Cluster.counters`; not of a host that has done nothing yet."""
    for host in counters:
        for name, gauge in _HOST.items():
            if host.packs:
                gauge.set(float(getattr(host, name)), {"host": host.host})


@contextmanager
def hosts_watched(cluster: Cluster, show: Callable[[list[HostCounters]], None]) -> Iterator[None]:
    """Exports and shows the hosts' counters every few seconds until the block ends."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            try:
                counters = cluster.counters()
            except Exception:  # Ray is shutting down or has died, which the search reports
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
