"""What is used of Ray without being public is there, and what is missing is said at the start."""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from tune_app.run.search_config import ConfigError
from tune_app.search.ray_tune import internals
from tune_app.search.ray_tune.cluster import RAY_ENVIRONMENT

PACKAGE = Path(__file__).parents[1] / "tune_app"


def test_this_ray_has_all_of_it() -> None:
    internals.check_ray()


def test_a_ray_that_lacks_something_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune import registry
    from ray.tune.execution.tune_controller import TuneController

    monkeypatch.delattr(registry, "_global_registry")
    monkeypatch.delattr(TuneController, "_schedule_trial_train")

    with pytest.raises(ConfigError) as error:
        internals.check_ray()
    (message,) = error.value.messages
    assert message.startswith(f"ray {ray.__version__} lacks ray.tune.registry._global_registry, ")
    assert "TuneController._schedule_trial_train" in message
    assert f"tested with ray {internals.TESTED}" in message


def test_the_limit_of_records_in_gcs_server_is_one_that_it_knows() -> None:
    """Ray ignores settings that it does not know."""
    (name,) = (name for name in RAY_ENVIRONMENT if name.endswith("_in_gcs"))
    (server,) = (Path(ray.__file__).parent / "core").rglob("gcs_server")
    assert name.removeprefix("RAY_").encode() in server.read_bytes()


def test_another_word_for_a_repeated_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune import result

    monkeypatch.setattr(result, "RESULT_DUPLICATE", "__again__")
    with pytest.raises(ConfigError, match="RESULT_DUPLICATE"):
        internals.check_ray()


def test_no_other_file_names_a_private_part_of_ray() -> None:
    private = re.compile(r"ray\.[\w.]*\b_[a-z]\w*|controller\._|trial\.pickled|ray\.train\._")
    named = {
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for file in PACKAGE.rglob("*.py")
        if file.name != "internals.py"
        for line in file.read_text().splitlines()
        if private.search(line)
    }
    assert named == set()


class _Ray:
    """As much of Ray's node as the check looks at: one process, this one."""

    all_processes = {  # noqa: RUF012
        "raylet": [type("Info", (), {"process": psutil.Process()})],
    }


@pytest.mark.parametrize(
    ("address", "fine"), [("127.0.0.1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False)]
)
def test_a_socket_open_to_others_is_found(
    address: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.worker._global_node", _Ray())
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "127.0.0.1"}])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind((address, 0))
        listening.listen()
        if fine:
            internals.check_loopback()
            return
        with pytest.raises(ConfigError, match=r"also listens on 0\.0\.0\.0"):
            internals.check_loopback()


def test_an_outside_address_of_the_node_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.worker._global_node", _Ray())
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "192.0.2.7"}])
    assert not ipaddress.ip_address("192.0.2.7").is_loopback
    with pytest.raises(ConfigError, match=r"listens on 192\.0\.2\.7"):
        internals.check_loopback()


def test_a_tuner_imports_no_trackers_to_count_them() -> None:
    code = """
import sys
from ray import tune
from ray.air._internal import usage
from tune_app.search.ray_tune.internals import ray_as_found
counts = usage.tag_callbacks
with ray_as_found():
    usage.tag_callbacks([tune.Callback()])
    print([name for name in ("mlflow", "wandb") if name in sys.modules])
print(usage.tag_callbacks is counts)
usage.tag_callbacks([tune.Callback()])
print([name for name in ("mlflow", "wandb") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["[]", "True", "['mlflow', 'wandb']"], said.stderr


def test_tensorboard_writes_its_curves_without_torch(tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
from tune_app.search.ray_tune.internals import without_torch
with without_torch():
    from tensorboardX import SummaryWriter
assert "torch" not in sys.modules
writer = SummaryWriter({str(tmp_path)!r})
writer.add_scalar("loss", 2.5, 1)
writer.close()
assert importlib.util.find_spec("torch")  # may be imported again
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert next(tmp_path.glob("events.out.tfevents.*")).stat().st_size > 0
