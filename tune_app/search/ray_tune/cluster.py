"""Ray, the swarm and the trial hosts that a search runs on: started together, ended together."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tune_app.models.folder import model_folder
from tune_app.run.host_counters import HostCounters
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.search.concurrency import hosts_on_cpu, most_trials_at_once
from tune_app.search.executor import StartError
from tune_app.search.host import TrialHost
from tune_app.search.ray_tune.internals import (
    LOOPBACK,
    check_loopback,
    check_ray,
    ray_processes,
    stay_on_this_machine,
)
from tune_app.search.ray_tune.places import ways_round
from tune_app.serve.connection import Connection, connection_to, start_private_swarm
from tune_app.tasks.summary import DataFacts

# No usage data is sent, and the output contains only our own messages.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TQDM": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the reasons are in the table
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Records of calls that gcs_server keeps for the dashboard, at 2 KB each: those of some hundred
    # trials. Ray's own limit is 100,000.
    "RAY_task_events_max_num_task_in_gcs": "2000",
}
_MOST_STARTED_AHEAD = 32  # workers; each takes half a second of CPU time
_LOOK_S = 1.0  # how often Ray's own processes are checked
# Threads of a host's actor that answer trials; each running trial waits in at most one.
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Cluster:
    """What a search runs on.

    hosts: actor handles
    tokens_in_flight: padded tokens that all hosts together compute concurrently
    dashboard: URL, or ""
    wait_if_ray_died: returns immediately while the Ray that was started here is alive, and never
        once it has died
    """

    hosts: list[Any]
    connection: Connection
    data: DataFacts
    tokens_in_flight: int
    dashboard: str
    wait_if_ray_died: Callable[[], None]

    def stop_trials(self) -> None:
        """Ends the training of all trials at their next step, without waiting for it."""
        for host in self.hosts:
            host.stop_all.remote()

    def counters(self) -> list[HostCounters]:
        """The counters of each host that still answers."""
        found = []
        for host in self.hosts:
            try:
                found.append(ray.get(host.counters.remote(), timeout=10))
            except ray.exceptions.RayError:
                continue  # the counters of a dead host are lost
        return found


@contextmanager
def open_cluster(
    config: SearchConfig,
    *,
    progress: Callable[[str], None],
    say: Callable[[str], None],
    ray_died: Callable[[], None],
) -> Iterator[Cluster]:
    """A ready Cluster. Raises ConfigError if the user's model, data or swarm cannot be used,
    StartError or PrivateSwarmError if something else is in the way.

    say: called, from a thread, when a server of the private swarm has ended or serves again
    ray_died: see `open_executor`
    """
    model = model_folder(config.model, config.revision)
    with ExitStack() as stack:
        private = start_private_swarm(config, model, progress=progress)
        if private is not None:
            stack.callback(private.stop)
        progress("starting Ray")
        ours = config.address is None and not ray.is_initialized()
        dashboard = stack.enter_context(_ray(config))
        wait_if_died = stack.enter_context(_watched_ray(ray_died)) if ours else _nothing
        hosts = _start_hosts(config, model)
        stack.callback(_stop_hosts, hosts)
        if private is not None:
            private.wait_until_ready(progress=progress)
            private.tell_changes(say)
        connection = connection_to(config, model, private)
        progress("loading the model and the data")
        try:
            data = ray.get([host.data_facts.remote() for host in hosts])[0]
            tokens = ray.get([host.connect.remote(connection) for host in hosts])
        except ray.exceptions.RayTaskError as error:
            raise _usage_error(error) from error
        except ray.exceptions.ActorDiedError as error:
            cause = _usage_error(getattr(error, "cause", None) or error)
            if cause is error:
                raise StartError(
                    "A trial host died several times while it loaded the model and the data. Most "
                    "often the memory is too small; fewer hosts (--hosts) need less."
                ) from error
            raise cause from error
        yield Cluster(hosts, connection, data, sum(tokens), dashboard, wait_if_died)


def _nothing() -> None:
    pass


def _usage_error(error: Exception) -> Exception:
    """The host's ConfigError or swarm failure as a ConfigError; anything else unchanged."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ConfigError):
        return ConfigError(cause.messages)
    if type(cause).__name__ == "BackboneUnavailable":
        return ConfigError(f"--peers: {cause}")
    return error


@contextmanager
def _ray(config: SearchConfig) -> Iterator[str]:
    """Ray, started here on loopback or joined at --address; yields the dashboard's URL. If this
    process is already connected to a Ray, that one is used and left as it is."""
    check_ray()
    if ray.is_initialized():
        yield ""
        return
    os.environ.update(RAY_ENVIRONMENT | ways_round())
    quiet = {
        "log_to_driver": config.verbose,
        "logging_level": "INFO" if config.verbose else "ERROR",
    }
    if config.address is not None:
        try:
            context = ray.init(address=config.address, **quiet)
        except Exception as error:  # Ray raises several unrelated types here
            raise ConfigError(
                f"--address: no answer from a Ray cluster at {config.address!r}: {error}"
            ) from error
    else:
        # Ray immediately starts a worker for each (logical) CPU, so for each trial; they are ready
        # when the hosts are. It warns about more than 3 times the startup concurrency.
        at_once = most_trials_at_once(config)
        workers = max(os.cpu_count() or 1, min(at_once, _MOST_STARTED_AHEAD))
        startup = str(max(workers, -(-at_once // 3)))
        os.environ |= {"RAY_worker_maximum_startup_concurrency": startup}
        stay_on_this_machine()
        try:
            with _deaf_to_hang_ups():
                context = ray.init(
                    address="local",  # otherwise Ray joins any cluster that it finds here
                    num_cpus=workers,
                    include_dashboard=True,
                    object_store_memory=256 * 2**20,  # reports and a few checkpoints pass through
                    **LOOPBACK,
                    **quiet,
                )
        except Exception as error:  # Ray raises several unrelated types here
            raise StartError(f"Ray did not start: {error}") from error
    try:
        if config.address is None:
            check_loopback()
        url = context.dashboard_url
        yield f"http://{url}" if url else ""
    finally:
        ray.shutdown()


@contextmanager
def _deaf_to_hang_ups() -> Iterator[None]:
    """Processes started in this block inherit that SIGHUP is blocked. A closing terminal sends it
    to all of them, and Ray would be gone before the search could end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _watched_ray(died: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yields a function that blocks once Ray has died, so that no trial is blamed for it before
    `died` ends the search."""
    (dead, kill), over, ending = ray_processes(), threading.Event(), threading.Event()

    def has_died() -> bool:
        # The dashboard, say, can be done without.
        return bool({"gcs_server", "raylet"} & dead())

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if has_died():
                ending.set()
                kill()
                died()
                return

    def wait_if_died() -> None:
        while ending.is_set() or has_died():
            time.sleep(_LOOK_S)

    threading.Thread(target=watch, name="ray-watch", daemon=True).start()
    try:
        yield wait_if_died
    finally:
        over.set()


def _start_hosts(config: SearchConfig, model: Path) -> list[Any]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = config.backbone == "local" and gpus > 0 and (config.device or "cuda") != "cpu"
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    count = config.hosts or (gpus if use_gpu else nodes)
    here = config.address is None
    if config.hosts is None and here and config.backbone == "local" and not use_gpu:
        count = hosts_on_cpu(config, model)
    threads = max(1, (os.cpu_count() or 1) // max(1, count // nodes))
    host = ray.remote(TrialHost)
    # One for each search, so that the hosts of several searches on one cluster do not clash.
    namespace = f"tune_app-{uuid.uuid4().hex[:8]}"
    return [
        host.options(
            name=f"host-{i}",
            namespace=namespace,
            num_cpus=0,
            num_gpus=1 if use_gpu else 0,
            max_restarts=3,
            max_concurrency=_MOST_CALLS,
            scheduling_strategy="SPREAD",
        ).remote(f"host-{i}", config, str(model), threads, is_restarted=True)
        for i in range(count)
    ]


def _stop_hosts(hosts: list[Any]) -> None:
    """Lets hosts close their swarm clients properly, then kills them."""
    closing = [host.close.remote() for host in hosts]
    ray.wait(closing, num_returns=len(closing), timeout=5)
    for host in hosts:
        ray.kill(host)
