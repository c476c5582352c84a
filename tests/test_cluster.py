"""Several hosts share the trials of one search: on one machine, and on two Ray nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SEARCH = [sys.executable, "-m", "tune_app.search", "--backbone", "local", "--trials", "4"]
SHORT = ["--steps", "4", "--batch-size", "2", "--confirm", "0", "--scheduler", "none"]

TWO_NODES = """
import subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
try:
    sys.exit(subprocess.run([*sys.argv[1:], "--address", cluster.address]).returncode)
finally:
    cluster.shutdown()
"""


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def check_two_hosts_shared(run: Path) -> None:
    ended = [event for event in events(run) if event["event"] == "trial_ended"]
    assert sorted(event["trial"] for event in ended) == [0, 1, 2, 3]
    assert {event["status"] for event in ended} == {"finished"}
    hosts = events(run)[-1]["hosts"]
    assert [host["host"] for host in hosts] == ["host-0", "host-1"]
    assert all(host["rows"] > 0 for host in hosts)
    # 4 trials x (4 steps x 2 rows + 4 evaluations x 128 rows), each row on one host
    assert sum(host["rows"] for host in hosts) == 4 * (4 * 2 + 4 * 128)


def test_two_hosts_on_one_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"

    subprocess.run([*SEARCH, *SHORT, "--hosts", "2", "--out", str(run)], check=True, timeout=120)

    check_two_hosts_shared(run)


def test_one_host_on_each_node_of_a_ray_cluster(tmp_path: Path) -> None:
    run = tmp_path / "run"

    subprocess.run(
        [sys.executable, "-c", TWO_NODES, *SEARCH, *SHORT, "--out", str(run)],
        check=True,
        timeout=180,
    )

    check_two_hosts_shared(run)
