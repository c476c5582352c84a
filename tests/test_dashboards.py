"""What dashboards get to see of a real search: Ray's actors and metrics, TensorBoard, Optuna."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode

import psutil
import pytest
from pages import lines_of
from shell import background, shell, users_environment

from benchmarks.relay import free_port
from tune_app.report.results import load
from tune_app.report.summary import next_steps
from tune_app.run.run_dir import RunDir
from tune_app.search.live import token_command
from tune_app.study.storage import STUDY_NAME

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 180
pytestmark = pytest.mark.slow


class Search:
    """The real command, in a process of its own, on the demo model in its host's process."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "run")
        self._log = folder / "log.txt"
        flags = "--backbone local --trials 30 --steps 200 --scheduler none --confirm 0"
        flags += " --hosts 1 --concurrency 2"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tune_app.search", *flags.split(), "--out", self.run.path],
                cwd=ROOT,
                env=users_environment()
                | {"RAY_metrics_report_interval_ms": "1000"},  # not each 10 s
                stdout=log,
                stderr=log,
            )
        self.dashboard = self.wait_for(
            lambda: re.search(r"Ray dashboard: (http://[\d.:]+)", self._log.read_text())
        )[1]
        self.token = subprocess.run(
            token_command().split(),
            env=users_environment(),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    def wait_for(self, look):
        """What `look` finds, once it finds something."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if found := look():
                return found
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.5)
        raise AssertionError(f"nothing after {TIMEOUT_S} s:\n{self._log.read_text()}")

    def ask(self, path: str):
        """The JSON that the dashboard answers with to whoever has the token."""
        request = urllib.request.Request(
            self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Iterator[Search]:
    running = Search(tmp_path_factory.mktemp("search"))
    yield running
    running.process.terminate()
    running.process.wait(timeout=60)


@pytest.fixture
def paused(search: Search) -> Iterator[Search]:
    """The search while nothing trains: what it has written is enough, and processors are free."""
    processes = psutil.Process(search.process.pid).children(recursive=True)
    (host,) = (process for process in processes if "TrialHost" in "".join(process.cmdline()))
    host.suspend()
    yield search
    host.resume()


def test_actors_have_names_that_a_person_recognises(search: Search) -> None:
    def actors() -> list[dict]:
        found = search.ask("/logical/actors")["data"]["actors"].values()
        return [actor for actor in found if actor["className"] == "Trial" and actor["reprName"]]

    trials = search.wait_for(actors)
    every = search.ask("/logical/actors")["data"]["actors"].values()

    assert {actor["name"] for actor in every if actor["className"] == "TrialHost"} == {"host-0"}
    assert all(re.fullmatch(r"trial-\d{3} and later", actor["reprName"]) for actor in trials)
    assert {actor["className"] for actor in every} == {"TrialHost", "Trial"}


def test_figures_arrive_at_the_metrics_endpoint(search: Search) -> None:
    def exported() -> dict[str, str] | None:
        found = {}
        for address in search.ask("/api/prometheus/sd")[0]["targets"]:
            with (
                suppress(URLError),  # one that is named before it listens
                urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer,
            ):
                for line in answer.read().decode().splitlines():
                    if match := re.match(r"ray_tune_app_(\w+)\{(.*)\} (\S+)$", line):
                        found[match[1]] = f"{match[2]} = {match[3]}"
        return found if len(found) == 4 else None

    figures = search.wait_for(exported)

    assert set(figures) == {"eval_loss", "rows_per_second", "pack_occupancy", "swarm_retries"}
    assert 'host="host-0"' in figures["rows_per_second"]
    assert float(figures["rows_per_second"].split(" = ")[1]) > 0
    assert 0 < float(figures["pack_occupancy"].split(" = ")[1]) <= 1
    assert re.search(r'\btrial="\d+"', figures["eval_loss"])
    assert 0 < float(figures["eval_loss"].split(" = ")[1]) < 1000


def test_the_lines_of_the_page_print_the_token_and_the_endpoints(
    search: Search, tmp_path: Path
) -> None:
    (show,), (curl,) = lines_of(".venv/bin/ray"), lines_of("curl")
    search.ask("/logical/actors")  # the dashboard is up
    curl = curl.replace("http://127.0.0.1:8265", search.dashboard)

    assert shell(show.replace(".venv/bin/", ""), tmp_path).strip() == search.token
    (answer,) = json.loads(shell(curl.replace(".venv/bin/", ""), tmp_path))
    assert answer["targets"]


def test_tensorboard_shows_the_curves(paused: Search, tmp_path: Path) -> None:
    search = paused
    (line,) = lines_of("tensorboard")
    line = line.replace("runs/first", str(search.run.path)) + f" --port {free_port()}"

    with background(line, tmp_path, r"at (http://localhost:\d+)") as started:

        def curve() -> dict[int, float]:
            points = {}
            for run in fetch(f"{started[1]}/data/runs"):
                if run.endswith("/trial-000"):
                    query = urlencode({"run": run, "tag": "ray/tune/eval_loss"})
                    points = fetch(f"{started[1]}/data/plugin/scalars/scalars?{query}")
            return {step: loss for _, step, loss in points}

        points = search.wait_for(curve)

    reported = [e for e in search.run.events() if e["event"] == "report" and e["trial"] == 0]
    losses = {event["step"]: event["eval_loss"] for event in reported[: len(points)]}
    assert points == pytest.approx(losses, rel=1e-5)


def test_optuna_dashboard_shows_the_study_while_the_search_runs(
    paused: Search, tmp_path: Path
) -> None:
    search = paused
    (line,) = lines_of("optuna-dashboard")
    line = line.replace("runs/first", str(search.run.path))
    (told,) = [step for step in next_steps(load(search.run)) if "optuna-dashboard" in step]

    assert told.endswith(line)
    with background(f"{line} --port {free_port()}", tmp_path, r"(http://\S+)/") as started:
        (study,) = fetch(f"{started[1]}/api/studies")["study_summaries"]
        detail = fetch(f"{started[1]}/api/studies/{study['study_id']}?after=0")

    assert study["study_name"] == STUDY_NAME
    assert study["directions"] == ["minimize"]
    assert [p["param_external_value"] for p in detail["trials"][0]["params"] if p["name"] == "lr"]


def fetch(address: str):
    """The JSON that a dashboard without a token answers with."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)
