"""Every command in the pages is run to its end, but for those that BY_HAND names with the reason.

They run as they stand, in bash, in the home of a reader who has what the pages name. Replaced is
what only a reader knows (a peer's address, a port), added are flags that make a search small.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from pages import LINES, PAGES, ROOT, SHELLS, blocks, lines_of
from shell import background, shell
from synthetic_runs import write_run
from tiny_models import write_tiny_model
from trained import write_rows

from benchmarks.relay import free_port
from tune_app.apply import cli as apply
from tune_app.report import cli as report
from tune_app.report.results import load
from tune_app.run.flags import parse_search_args
from tune_app.run.run_dir import RunDir
from tune_app.search import cli as search
from tune_app.search import estimate
from tune_app.train import cli as train

OURS = r"python -m tune_app\.(?!search --(mlflow|wandb) )"
# The test file -> how the lines begin that it runs.
RUN = {
    "test_docs.py": (
        "make ",
        OURS,
        "ray ",
    ),
    "test_dashboards.py": (r"\.venv/bin/ray ", "curl ", "optuna-dashboard ", "tensorboard "),
    "test_tracking.py": (
        "mlflow server ",
        r"python -m tune_app\.search --(mlflow|wandb) ",
        "export WANDB_MODE=offline$",
    ),
}
# How a line begins -> why no test runs it.
BY_HAND = {
    r"python3\.11 -m venv ": "begins an install",
    r"\.venv/bin/pip install ": "takes gigabytes from a package index, as `make` does in CI",
    "uv (sync|run|venv|pip)": "takes gigabytes from a package index, and needs uv",
    "pip install ": "takes a package from an index",
    "wandb (login|sync)": "needs an account and W&B's servers",
}
STARTS = [*(start for starts in RUN.values() for start in starts), *BY_HAND]
SEARCHES = lines_of("python -m tune_app.search")
DRY = [line for line in SEARCHES if "--dry-run" in line]
FIRST = "python -m tune_app.search --train reviews.csv --text-column text --label-column stars"
REAL = [line for line in SEARCHES if re.match(OURS, line) and line not in DRY]
SMALL = "--steps 2 --batch-size 2 --confirm 0 --quiet"
PEER = "/ip4/10.1.2.3/tcp/31337/p2p/12D3KooW..."
ADDRESS = "10.1.2.3:6379"


def arguments(line: str) -> list[str]:
    """What follows the command's name, without what a shell redirects."""
    words = shlex.split(line.partition(" < ")[0])
    return words[words.index("-m") + 2 :]


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_run_by_one_test_or_by_hand(line: str) -> None:
    assert sum(bool(re.match(start, line)) for start in STARTS) == 1


@pytest.mark.parametrize("start", STARTS)
def test_the_lists_name_what_the_pages_have(start: str) -> None:
    assert any(re.match(start, line) for line in LINES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_shell(page: Path) -> None:
    for block in blocks(page, *SHELLS):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("line", lines_of("make"))
def test_make_knows_the_target(line: str) -> None:
    """CI installs and tests by `make check`; the search that then starts, test_search runs."""
    assert "python -m " in shell(line.replace("make", "make -n"), ROOT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's home, where the lines are typed: the model, the data and the spaces they name."""
    home = tmp_path_factory.mktemp("home")
    write_tiny_model("llama", home / "models" / "Llama-3.1-8B")
    for name, first, count in (("reviews", 0, 60), ("reviews-2025", 300, 6), ("more", 300, 6)):
        rows = write_rows(home / f"{name}.csv", first, count)
        rows.write_text(rows.read_text().replace("label", "stars", 1))
    for name, first, count in (("train", 0, 40), ("valid", 100, 12), ("test", 200, 12)):
        rows = pd.read_csv(write_rows(home / f"{name}.csv", first, count))
        rows.to_json(home / f"{name}.jsonl", orient="records", lines=True)
    points = pd.DataFrame([(f"essay {'word ' * (i % 7)}{i}", i % 7) for i in range(40)])
    points.to_csv(home / "essays.csv", index=False, header=["text", "points"])
    pairs = pd.DataFrame([(f"what is {i}?", f"{i}") for i in range(40)])
    pairs.set_axis(["prompt", "completion"], axis=1).to_json(
        home / "answers.jsonl", orient="records", lines=True
    )
    (home / "handbook.txt").write_text((ROOT / "README.md").read_text())
    (home / "lines.txt").write_text("wing nest\nroot bark\n")
    page = ROOT / "docs" / "your-space.md"
    (home / "my_space.yaml").write_text(blocks(page, "yaml")[0])
    (home / "my_space.py").write_text(blocks(page, "python")[0])
    for name in ("a", "b"):
        write_run(home / "runs" / name, confirm_seeds=2)
    return home


def in_process(line: str, home: Path) -> str:
    """What the search of a line prints, run in this process as if typed in `home`."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(home)
        patch.setenv("HOME", str(home))
        assert search.main(arguments(line)) == 0, said.getvalue()
    return said.getvalue()


def run_search(line: str, home: Path, **more: str) -> RunDir:
    """Runs a line as a search of 2 trials, or 3 where it says how many, and looks at its run.

    A line without --peers runs on a local model: the private swarm that it would start,
    test_search has. A line that asks for something of Ray's runs on Ray. The others run in this
    process, but for the search that leaves runs/reviews: a command.
    """
    trials = 3 if "--trials" in line else 2
    small = re.sub(r"--trials \d+", "", line) + f" --trials {trials} {SMALL}"
    if "--peers" not in line:
        small += " --backbone local"
    on_ray = re.search("--address|pbt", line)
    if not on_ray:
        small += " --executor in-process"
    if on_ray or "--out runs/reviews" in line:
        said = shell(small, home, {"HOME": str(home), **more})
    else:
        said = in_process(small, home)
    (folder,) = re.findall(r"(?m)^Report: +(/.*)/report\.html$", said)
    run = RunDir(folder)
    counts = load(run).counts
    assert sum(counts.values()) == trials
    assert counts.keys() <= {"finished", "stopped"}
    assert (run.prompts / "prompts.safetensors").exists()
    return run


@pytest.fixture(scope="module")
def reviews(home: Path) -> Path:
    """The home with runs/reviews, the finished search that other lines start from."""
    assert FIRST in SEARCHES
    run_search(f"{FIRST} --model ~/models/Llama-3.1-8B --out runs/reviews", home)
    return home


@pytest.fixture(scope="module")
def peer(home: Path) -> Iterator[str]:
    """An address of the swarm that the lines of your-swarm.md start, each with one block of two."""
    first, others = (line for line in lines_of("python -m tune_app.serve") if "--listen" in line)
    ready = r"(?m)^blocks \S+  (\S+)$(?s:.*)Ctrl-C to stop"

    def near(line: str, blocks: str) -> str:
        line = re.sub(r"--blocks \S+", f"--blocks {blocks} --device cpu", line)
        line = line.replace("server.key", f"server-{blocks[0]}.key")
        return re.sub(r"--listen \S+", f"--listen 127.0.0.1:{free_port()}", line)

    here = {"HOME": str(home)}
    with (
        background(near(first, "0:1"), home, ready, here) as one,
        background(near(others.replace(PEER, one[1]), "1:2"), home, ready, here),
    ):
        yield one[1]


@pytest.fixture(scope="module")
def ray_cluster(home: Path) -> Iterator[str]:
    """The address of the two nodes that the lines of ray-cluster.md start, with a token."""
    show, generate = lines_of("ray get-auth-token")
    here = {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    shell(generate, home, here)
    assert shell(show, home, here).strip() == (home / ".ray" / "auth_token").read_text()
    others, head = lines_of("ray start")
    address = f"127.0.0.2:{free_port()}"  # Ray puts an outside address in the place of 127.0.0.1
    head = head.replace("6379", address.partition(":")[2]) + " --node-ip-address=127.0.0.2"
    others = others.replace(ADDRESS, address) + " --node-ip-address=127.0.0.3"
    started, small = "Ray runtime started", "--num-cpus=2 --block"
    with (
        background(f"{head} --include-dashboard=false {small}", home, started, here),
        background(f"{others} {small}", home, started, here),
    ):
        yield address


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.swarm] * ("--peers" in line))
        for line in REAL
        if "--address" not in line
    ],
)
def test_a_search_runs(line: str, home: Path, request: pytest.FixtureRequest) -> None:
    if "--resume" in line or "--warm-start" in line:
        request.getfixturevalue("reviews")
    if "--peers" in line:
        line = line.replace(PEER, request.getfixturevalue("peer"))
        line = line.replace("runs/reviews", "runs/on-the-swarm")
    run_search(line, home)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_searches_on_one_cluster_each_have_a_host_on_each_node(
    home: Path, ray_cluster: str
) -> None:
    """Their hosts have the same names, so each search keeps them in a namespace of its own."""
    (line,) = (line for line in REAL if "--address" in line)
    line = line.replace(ADDRESS, ray_cluster).replace("/shared/runs/reviews", "shared/{}")

    def search(name: str) -> RunDir:
        return run_search(line.format(name), home, RAY_AUTH_MODE="token")

    def one_beside_the_other(runs: list[RunDir]) -> bool:
        began, ended = (
            [event["time"] for run in runs for event in run.events() if event["event"] == kind]
            for kind in ("search_started", "search_ended")
        )
        return max(began) < min(ended)

    with ThreadPoolExecutor(2) as pool:
        for names in ("ab", "cd", "ef"):  # on a busy machine one may begin when the other has ended
            runs = list(pool.map(search, names))
            if one_beside_the_other(runs):
                break
        else:
            pytest.fail("they did not run at the same time")

    for run in runs:
        hosts = run.events()[-1]["hosts"]
        assert [host["host"] for host in hosts] == ["host-0", "host-1"]
        assert all(host["rows"] > 0 for host in hosts)
        # 2 trials x (2 steps of 2 rows and 2 evaluations of 128)
        assert sum(host["rows"] for host in hosts) == 2 * (2 * 2 + 2 * 128)


@pytest.mark.parametrize("line", DRY)
def test_a_dry_run_starts_nothing(line: str, home: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(estimate, "_TIMES", 1)  # how long a step takes here is of no interest
    assert search.main(arguments(line)) == 0, capsys.readouterr().err
    assert "Nothing has been started." in capsys.readouterr().out


@pytest.mark.parametrize("line", lines_of("python -m tune_app.train"))
def test_train_runs(line: str, reviews: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(reviews)
    assert train.main([*arguments(line), "--steps=2"]) == 0, capsys.readouterr().err
    assert "test loss" in capsys.readouterr().out


@pytest.mark.parametrize("line", lines_of("python -m tune_app.report"))
def test_report_runs(line: str, reviews: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(reviews)
    assert report.main(arguments(line)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("line", lines_of("python -m tune_app.apply"))
def test_apply_runs(line: str, reviews: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(reviews)
    with open(line.partition(" < ")[2] or "lines.txt") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert apply.main(arguments(line)) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.swarm
@pytest.mark.parametrize(
    "line", [line for line in lines_of("python -m tune_app.serve") if "--listen" not in line]
)
def test_a_private_swarm_starts_and_names_the_search(line: str, home: Path) -> None:
    here = {"HOME": str(home)}
    ready = r"(python -m tune_app\.search .*)\n(?s:.*)Ctrl-C to stop the servers"
    with background(f"{line} --device cpu", home, ready, here) as said:
        assert parse_search_args(arguments(said[1])).peers


def test_the_excerpt_of_the_readme_is_of_the_recording() -> None:
    recording = (ROOT / "docs" / "terminal.txt").read_text().splitlines()
    excerpt = next(b for b in blocks(ROOT / "README.md", "text") if b.startswith("trial"))
    for line in excerpt.splitlines():
        assert line in recording or line.strip() in ("...", ""), line


def test_readme_lists_every_room_and_page() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in sorted((ROOT / "tune_app").glob("*/__init__.py")):
        assert f"`tune_app/{room.parent.name}/`" in readme, room.parent.name
    for path in PAGES:
        assert path.name == "README.md" or f"docs/{path.name}" in readme, path.name
