"""Everything private in Ray that is used here. No other file uses private parts of it.

`check_ray` checks before a search starts that all of it is still there. So if another version of
Ray has moved something, there is one clear error instead of a hang or an open port later on.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import ray

from tune_app.run.search_config import ConfigError
from tune_app.search.trial_job import DUPLICATE

TESTED = "2.60.0"

_Part = tuple[str, str]
_RESOLVE: _Part = ("ray._private.services", "resolve_ip_for_localhost")
_START: _Part = ("ray._private.services", "start_ray_process")
_WORKER: _Part = ("ray._private.worker", "_global_node")
_DEAD: _Part = ("ray._private.node", "Node.dead_processes")
_KILL: _Part = ("ray._private.node", "Node.kill_all_processes")
_ENVIRONMENT: _Part = ("ray.tune.execution.class_cache", "DEFAULT_ENV_VARS")
_STORAGE: _Part = ("ray.train._internal.storage", "StorageContext")
_TRIAL_INFO: _Part = ("ray.tune.experiment.trial", "_TrialInfo")
_REGISTRY: _Part = ("ray.tune.registry", "_global_registry")
_KIND: _Part = ("ray.tune.registry", "TRAINABLE_CLASS")
_ERROR: _Part = ("ray.tune.experiment.trial", "Trial.pickled_error_file")
_NEXT_CALL: _Part = ("ray.tune.execution.tune_controller", "TuneController._schedule_trial_train")
_SAVE: _Part = ("ray.tune.execution.tune_controller", "TuneController.save_to_dir")
_STAGING: _Part = ("ray.train._internal.storage", "StorageContext.experiment_driver_staging_path")
_STATE: _Part = (_SAVE[0], "TuneController.experiment_state_file_name")
_TASK_FAILURE: _Part = ("ray.tune.execution.tune_controller", "TuneController._trial_task_failure")
_COUNT_CALLBACKS: _Part = ("ray.air._internal.usage", "tag_callbacks")
_DUPLICATE: _Part = ("ray.tune.result", "RESULT_DUPLICATE")

_NO_LOGGERS = "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"
# Ray's dashboard looks up in which cloud it runs, at addresses outside this machine, even where
# usage statistics are off. No setting keeps it from that, but nobody answers at this proxy.
_ASKS_NOBODY = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1,localhost"}
# Makes Ray's processes listen on loopback only.
LOOPBACK = {"_node_ip_address": "127.0.0.1", "dashboard_host": "127.0.0.1"}


def _part(part: _Part) -> Any:
    module, path = part
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def check_ray() -> None:
    """Raises ConfigError if this version of Ray lacks what the functions below rely on."""
    parts = [_RESOLVE, _START, _WORKER, _DEAD, _KILL, _ENVIRONMENT, _STORAGE, _TRIAL_INFO]
    parts += [_REGISTRY, _KIND, _ERROR, _NEXT_CALL, _TASK_FAILURE, _COUNT_CALLBACKS, _DUPLICATE]
    parts += [_SAVE, _STAGING, _STATE]
    missing = []
    for part in parts:
        try:
            _part(part)
        except (ImportError, AttributeError):
            missing.append(".".join(part))
    if not missing and _part(_DUPLICATE) != DUPLICATE:
        missing.append(f"{'.'.join(_DUPLICATE)} == {DUPLICATE!r}")
    if missing:
        raise ConfigError(
            f"ray {ray.__version__} lacks {', '.join(missing)}; tune_app was tested with ray "
            f'{TESTED}: pip install "ray[default,tune]=={TESTED}"'
        )


def stay_on_this_machine() -> None:
    """To be called before `ray.init(**LOOPBACK)`, as often as that.

    Ray replaces 127.0.0.1 by an outside address and then listens on all of them; and its dashboard
    asks outside.
    """
    module, name = _RESOLVE
    setattr(importlib.import_module(module), name, lambda host: host)
    start = _part(_START)
    if hasattr(start, "asks_nobody"):
        return

    def start_ray_process(command: Any, process_type: str, *given: Any, **named: Any) -> Any:
        if process_type == "dashboard":
            named["env_updates"] = {**named.get("env_updates", {}), **_ASKS_NOBODY}
        return start(command, process_type, *given, **named)

    start_ray_process.asks_nobody = True  # type: ignore[attr-defined]
    module, name = _START
    setattr(importlib.import_module(module), name, start_ray_process)


def check_loopback() -> None:
    """Raises ConfigError if a process of the Ray that was started here listens elsewhere."""
    known = {node["NodeManagerAddress"] for node in ray.nodes()} | set(_listening())
    outside = sorted(address for address in known if not _is_loopback(address))
    if outside:
        raise ConfigError(
            f"ray {ray.__version__} also listens on {', '.join(outside)}, so others could run code "
            f"here; tune_app was tested with ray {TESTED}."
        )


def _listening() -> Iterator[str]:
    """Addresses at which Ray's processes, and their children, accept connections."""
    for processes in _part(_WORKER).all_processes.values():
        for info in processes:
            try:
                first = psutil.Process(info.process.pid)
                for process in (first, *first.children(recursive=True)):
                    for socket in process.net_connections("inet"):
                        if socket.status == psutil.CONN_LISTEN:
                            yield socket.laddr.ip
            except psutil.Error:  # it has just ended
                continue


def _is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def ray_processes() -> tuple[Callable[[], set[str]], Callable[[], None]]:
    """For the Ray that was started here: functions that return which kinds of its processes have
    died, and that kill the others immediately."""
    node = _part(_WORKER)

    def dead() -> set[str]:
        return {kind for kind, _ in node.dead_processes()}

    def kill() -> None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)

    return dead, kill


def register_actor(name: str, actor: type) -> None:
    """Registers a trainable with Tune that is not a subclass of Tune's.

    `tune.register_trainable` only accepts subclasses, whose imports cost each trial's process half
    a second.
    """
    # Tune starts trials with a special environment (for PyTorch Lightning), which costs 0.3 s of
    # CPU time each, and does not use the processes that Ray has ready.
    _part(_ENVIRONMENT).clear()
    for unused in (_STORAGE, _TRIAL_INFO):  # sent along; to unpickle them takes Ray Tune
        ray.util.register_serializer(_part(unused), serializer=_nothing, deserializer=_nothing)
    _part(_REGISTRY).register(_part(_KIND), name, actor)


def _nothing(_: object) -> None:
    return None


@contextmanager
def ray_as_found() -> Iterator[None]:
    """Undoes a search's changes to Ray in this process, so that the caller can use a Tuner
    later."""
    environment = dict(_part(_ENVIRONMENT))
    loggers = os.environ.get(_NO_LOGGERS)
    os.environ[_NO_LOGGERS] = "1"  # JSON and CSV: the events have it all
    try:
        # For its usage statistics, though they are off, Tune counts callbacks of MLflow and W&B,
        # which it imports for that where they are installed: two seconds.
        with _replaced(_COUNT_CALLBACKS, _nothing):
            yield
    finally:
        if loggers is None:
            os.environ.pop(_NO_LOGGERS, None)
        else:
            os.environ[_NO_LOGGERS] = loggers
        _part(_ENVIRONMENT).update(environment)
        for sent in (_STORAGE, _TRIAL_INFO):
            ray.util.deregister_serializer(_part(sent))


@contextmanager
def without_saved_trials() -> Iterator[None]:
    """Keeps Tune from saving all trials every 10 s, for a `Tuner.restore` that never comes: after
    1,000 trials that is 11 MB each time, kept in memory as well. The events have it all."""

    def save_to_dir(controller: Any) -> None:
        # This folder is copied to the run next, with TensorBoard's files. Tune looks for the file.
        folder = Path(controller._storage.experiment_driver_staging_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / controller.experiment_state_file_name).write_text('{"trial_data": []}')

    with _replaced(_SAVE, save_to_dir):
        yield


@contextmanager
def retried_if_actor_dies_between_trials() -> Iterator[None]:
    """Makes Tune retry a trial whose actor dies before it begins.

    Tune handles the death of an actor twice, as the actor's failure and as that of the call it was
    in. If the call was to make it the next trial's actor, the first one puts the trial back into
    the queue and the second one, which finds it there, ends it as failed.
    """
    failed = _part(_TASK_FAILURE)

    def task_failed(controller: Any, trial: Any, exception: Exception) -> None:
        if trial.status == "PENDING" and isinstance(exception, ray.exceptions.RayActorError):
            controller._resetting_trials.discard(trial)  # or it would get no other actor
        else:
            failed(controller, trial, exception)

    with _replaced(_TASK_FAILURE, task_failed):
        yield


@contextmanager
def _replaced(function: _Part, by: Callable[..., None]) -> Iterator[None]:
    """A function of a module, or a method of a class in one."""
    module, path = function
    owner, _, name = path.rpartition(".")
    holder = _part((module, owner)) if owner else importlib.import_module(module)
    original = getattr(holder, name)
    setattr(holder, name, by)
    try:
        yield
    finally:
        setattr(holder, name, original)


@contextmanager
def without_torch() -> Iterator[None]:
    """For tensorboardX, which loads torch if it is there: two seconds and 200 MB for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it fails
    try:
        yield
    finally:
        del sys.modules["torch"]


def failure_of(trial: Any) -> BaseException:
    """The exception of a failed Tune trial."""
    # The local copy; the one in the trial's storage, which Ray itself reads, is one failure behind.
    file = trial.pickled_error_file
    # Without a file it is an error of Ray Tune itself, which is only kept as text.
    error = pickle.loads(Path(file).read_bytes()) if file else trial.get_error()
    cause: BaseException = getattr(error, "cause", None) or error
    return cause


def forget_first_result(trial: Any) -> None:
    """Drops what Tune has asked an actor for in case a trial never reports; 2 KB with all that
    belongs to the call."""
    trial._default_result_or_future = None


def train_on(controller: Any, trial: Any) -> None:
    """Asks a running trial that was left waiting for its next report.

    A scheduler gets a wrapper of the controller that only offers pausing and resuming, which would
    end the trial's actor.
    """
    controller._tune_controller._schedule_trial_train(trial)
