"""The benchmark's arms train the same thing; its figures follow from its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import generation, real_model, search_throughput, throughput_tables
from benchmarks.search_throughput import ArmsDisagree, Bench, on_swarm, write_results
from benchmarks.workload import Workload, write_data
from tune_app.backbones.local import LocalBackbone
from tune_app.models.folder import model_folder


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(600)
def test_it_runs_and_all_arms_agree_on_the_losses(tmp_path: Path) -> None:
    """Each kind of arm, on a real swarm or with a local model; one disagreement would raise."""
    write_data(tmp_path)
    bench, workload = Bench(repeats=1), Workload(str(tmp_path), trials=2, steps=2)
    with on_swarm(workload) as on_servers:
        for arm in ("E2", "F8"):
            bench.run(arm, on_servers, "throughput")
    bench.run("A8", workload, "throughput")
    text = write_results(tmp_path, bench.runs, {"processor": "two cores"})
    assert "swarm: E at its best ÷ F" in text
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 3


def test_a_different_loss_of_one_trial_is_an_error(tmp_path: Path) -> None:
    bench, workload = Bench(repeats=1), Workload(str(tmp_path), trials=2)
    bench._compare("A8", workload, [2.0, 1.5])
    bench._compare("F8", workload, [2.0001, 1.5])
    with pytest.raises(ArmsDisagree, match=r"F8: trial 1 ends at 1\.6, elsewhere at 1\.5"):
        bench._compare("F8", workload, [2.0, 1.6])
    with pytest.raises(ArmsDisagree):
        bench._compare("F8", workload, [float("nan"), 1.5])


def test_every_row_of_the_data_has_the_same_length(tmp_path: Path) -> None:
    write_data(tmp_path)
    data = Workload(str(tmp_path)).data()
    assert set(data.train.batch(range(len(data.train))).lengths_B.tolist()) == {32}
    assert len(data.valid) == 4


def test_figures_are_ratios_of_medians() -> None:
    rows = [
        _row("E2", 90.0),
        _row("R2", 60.0),
        *(_row("F8", seconds, rows_per_s=90.0) for seconds in (19.0, 20.0, 50.0)),
        _row("A8", 18.0, rows_per_s=100.0),
        _row("F16", 29.0),  # too short for a steady state: no rate
        _row("A16", 18.0, rows_per_s=100.0),
    ]
    found = {name: value for name, value, _ in throughput_tables.headline(rows)}
    assert found["swarm: E at its best ÷ F, wall time"] == 3.0
    assert found["swarm: E without reuse ÷ F"] == 4.5
    assert found["swarm: F's rows/s in steady state ÷ A's, 8 at once"] == 0.9
    assert found["local: E at its best ÷ F"] is None
    assert found["swarm: F's rows/s in steady state ÷ A's, 16 at once"] is None
    table = throughput_tables.summarise(rows).set_index("arm")
    assert (table.loc["F8", ["runs", "seconds", "least", "most"]] == [3, 20.0, 19.0, 50.0]).all()


def test_what_petals_own_server_needs_is_told_apart() -> None:
    rows = [_row("R2", 60.0), _row("A8", 10.0), _row("F8", 20.0)]
    rows += [
        _row(arm, seconds) | {"backbone": "stock"} for arm, seconds in (("R2", 80.0), ("A8", 20.0))
    ]
    found = {name: value for name, value, _ in throughput_tables.headline(rows)}
    assert found["swarm: E at its best ÷ F, wall time"] == 3.0
    assert found["swarm: E at its best on Petals' own server ÷ F"] == 4.0
    assert found["our server ÷ Petals' own, bare packed loop, seconds"] == 0.5


def _row(arm: str, seconds: float, **values: float) -> dict:
    run = search_throughput.Run("throughput", "swarm", arm, 0, 24, seconds, seconds)
    return vars(run) | values


@pytest.mark.slow
def test_a_search_is_measured(tmp_path: Path) -> None:
    """As on SmolLM2, which would have to be fetched, but on the demo model."""
    words = real_model.command(model_folder("demo"), "local", 2, 2, tmp_path / "run", at_once=2)
    found = real_model.search([*words, "--executor=in-process"])
    assert 0 < found.until_first_report < found.seconds
    assert found.peak_mb > 100
    assert 0 <= found.accuracy <= 1
    assert "accuracy 0." in str(found)


def test_a_continued_text_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    local = LocalBackbone(model_folder("demo"), device="cpu", dtype="float32")
    generation.measure("local", local, [5, 6, 7, 8], repeats=1)
    assert "the same tokens" in capsys.readouterr().out
