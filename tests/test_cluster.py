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

# Two nodes, and on them the same command for each folder at the same time.
TWO_NODES = """
import subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
folders, command = sys.argv[1:3], [*sys.argv[3:], "--address", cluster.address]
try:
    searches = [subprocess.Popen([*command, "--out", folder]) for folder in folders]
    sys.exit(max([search.wait() for search in searches]))
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
    # 4 trials x (4 steps of 2 rows, 3 evaluations of 16 rows and the last one of 128)
    assert sum(host["rows"] for host in hosts) == 4 * (4 * 2 + 3 * 16 + 128)


def test_two_hosts_on_one_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"

    subprocess.run([*SEARCH, *SHORT, "--hosts", "2", "--out", str(run)], check=True, timeout=120)

    check_two_hosts_shared(run)


def test_two_searches_on_one_cluster_each_have_a_host_on_each_node(tmp_path: Path) -> None:
    """Their hosts have the same names, so each search keeps them in a namespace of its own."""
    runs = [tmp_path / name for name in "ab"]

    subprocess.run(
        [sys.executable, "-c", TWO_NODES, *map(str, runs), *SEARCH, *SHORT],
        check=True,
        timeout=240,
    )

    for run in runs:
        check_two_hosts_shared(run)
    began, ended = (
        [event["time"] for run in runs for event in events(run) if event["event"] == kind]
        for kind in ("search_started", "search_ended")
    )
    assert max(began) < min(ended), "they did not run at the same time"
