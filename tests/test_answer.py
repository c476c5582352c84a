"""The answer: what is compared with what, how sure it is, and that all places say the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import write_run

from tune_app.report.evidence import level_of
from tune_app.report.judging import judged, runs_of
from tune_app.report.page.page import report_page
from tune_app.report.results import Results, load
from tune_app.report.summary import summary
from tune_app.report.verdict import decided, verdict
from tune_app.run import test_rows
from tune_app.run.run_dir import RunDir
from tune_app.tasks.objectives import always_the_most_frequent

CLASSES = {"rows": {"train": 40, "valid": 20, "test": 20}, "judged": 20}
CLASSES |= {"class_names": ["cat", "dog"], "constant_answer": "cat"}
CLASSES |= {"class_counts": {"train": [30, 10], "valid": [15, 5], "test": [15, 5]}}

STARTED = {"event": "search_started", "task": "classification", "metric": "accuracy"}
STARTED |= {"data": CLASSES}


class Writer:
    """Writes the events of a run by hand."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.run = RunDir(folder).create()
        self.run.write_atomic(
            self.run.search_yaml, "\n".join(f"{key}: {value}" for key, value in settings.items())
        )

    def trial(self, number: int, loss: float, origin: str = "suggested", **more: Any) -> None:
        self._one(number, {"origin": origin}, {"seed": 0}, loss, **more)

    def again(
        self,
        of: int,
        seed: int,
        look: int | None,
        valid: float,
        test: float | None = None,
        status: str = "finished",
        rows: list[float] | None = None,
        **more: Any,
    ) -> None:
        start = {"origin": "confirm", "of": of} | ({} if look is None else {"look": look})
        number = 100_000 + 100 * of + seed
        if test is not None:
            more["test_loss"] = test
        self._one(number, start, {"seed": 1000 * seed}, valid, status, **more)
        if rows is not None:
            content = test_rows.packed([{"loss": loss, "targets": 1} for loss in rows])
            self.run.write_atomic(self.run.test_rows(number), content)

    def _one(
        self,
        number: int,
        start: dict[str, Any],
        config: dict[str, Any],
        loss: float,
        status: str = "finished",
        **more: Any,
    ) -> None:
        write = self.run.append_event
        write({"event": "trial_started", "trial": number, "config": {"lr": 0.1} | config} | start)
        report = {"event": "report", "trial": number, "step": 10, "eval_loss": loss}
        write({"accuracy": 0.5, "objective": loss, **report, **more})
        write({"event": "trial_ended", "trial": number, "status": status})

    def load(self) -> Results:
        return load(self.run)


def searched(folder: Path, **settings: Any) -> Writer:
    """A default at 2.0 and three better trials, of which trial 1 was luckiest in the search."""
    writer = Writer(folder, confirm_seeds=6, **settings)
    for number, loss in enumerate((2.0, 1.5, 1.6, 1.7)):
        writer.trial(number, loss, "default" if number == 0 else "suggested")
    return writer


def judge(
    writer: Writer,
    gaps: list[float],
    *,
    look: int = 1,
    first: int = 3,
    valid: float = 1.6,
    status: str = "finished",
    rows: int = 0,
    row_noise: float = 0.0,
) -> None:
    """Trial 2 against the default, one seed for each gap; both have the same rows."""
    generator = np.random.default_rng(0)
    noise = row_noise * generator.standard_normal(rows)
    noise -= noise.mean() if rows else 0
    for seed, gap in enumerate(gaps, start=first):
        base = 2.0 + 0.1 * math.sin(seed)  # what a seed does to both
        writer.again(0, seed, look, 1.9, base, rows=[base] * rows if rows else None)
        mine = [base + gap + float(x) for x in noise] if rows else None
        writer.again(2, seed, look, valid, base + gap, status, rows=mine)


def choose(writer: Writer, best: int = 2) -> None:
    for of in (1, 2, 3):
        for seed in (1, 2):
            writer.again(of, seed, 0, 1.5 if of == best else 1.8)


# ----------------------------------------------------------------------------------- who is judged


def test_chosen_by_validation_with_seeds_that_judge_nothing(tmp_path: Path):
    writer = searched(tmp_path)
    choose(writer, best=2)
    assert writer.load().chosen == 2  # trial 1 was ahead in the search
    assert writer.load().evidence is None
    judge(writer, [-0.3, -0.31, -0.29])
    results = writer.load()
    assert results.evidence is not None
    assert results.evidence.pairs == 3
    assert results.evidence.gap.mean == pytest.approx(-0.3)
    assert list(results.confirm["part"]) == ["chosen", "baseline", "other", "other"]
    assert results.best is not None
    assert results.best["trial"] == 2
    found = verdict(results)
    assert found.kind == "better"
    assert found.headline == "Trial 2 is better than the default"
    assert "3 fresh seeds, trial 2 reaches a mean test loss of" in found.sentence


@pytest.mark.parametrize(
    ("gaps", "kind", "said"),
    [
        ([-0.3, -0.31, -0.29], "better", "a paired difference of \N{MINUS SIGN}0.300"),
        ([0.3, 0.31, 0.29], "not better", "a paired difference of +0.300"),
        ([0.0, 0.001, -0.001], "not better", "A gain of more than 0.019 is ruled out."),
        ([-0.1, -0.05, -0.2], "undecided", "fresh seeds would decide it (--confirm-seeds "),
        ([-0.1], "undecided", "One pair of runs is too few"),
    ],
)
def test_three_answers(tmp_path: Path, gaps: list[float], kind: str, said: str):
    writer = searched(tmp_path)
    choose(writer)
    judge(writer, gaps)
    writer.run.write_atomic(writer.run.search_yaml, f"confirm_seeds: {len(gaps)}\n")
    results = writer.load()
    found = verdict(results)
    assert found.kind == decided(results) == kind
    assert said in found.sentence
    headlines = {"better": "Trial 2 is better than the default"}
    headlines |= {"not better": "No better than the default", "undecided": "Too close to tell"}
    assert found.headline == headlines[kind]
    assert found.exit_code == 0
    # One function says it, and everybody shows it.
    assert f"{found.headline}. " in " ".join(summary(results).split())
    assert f"<h1>{found.headline}</h1>" in report_page(results)


def test_a_second_look_spends_another_part(tmp_path: Path):
    """At the first look's level six pairs would do; what is left of the 5 % decides."""
    writer = searched(tmp_path)
    choose(writer)
    judge(writer, [-0.1, -0.04, -0.16])
    assert decided(writer.load()) == "undecided"
    judge(writer, [-0.1, -0.07, -0.13], look=2, first=6)
    evidence = writer.load().evidence
    assert evidence is not None
    assert (evidence.look, evidence.pairs) == (2, 6)
    assert evidence.gap.level == level_of(2)
    assert decided(writer.load()) == "better"


def test_half_a_look_says_nothing_new(tmp_path: Path):
    """Whoever looks in between, or kills the command, must not see an answer earlier."""
    writer = searched(tmp_path)
    choose(writer)
    judge(writer, [-0.1, -0.04, -0.16])
    before = writer.load().evidence
    judge(writer, [-0.1, -0.1], look=2, first=6)
    results = writer.load()
    state = judged(runs_of(results.trials), 2, 0, 6)
    assert (state.before, state.due, state.done, state.complete) == (3, 6, 5, False)
    assert results.evidence == before


def test_a_config_that_diverges_with_a_seed_is_not_better(tmp_path: Path):
    writer = searched(tmp_path)
    choose(writer)
    judge(writer, [-0.3, -0.31])
    judge(writer, [0], first=5, status="diverged")
    results = writer.load()
    assert decided(results) != "better"
    assert "1 run of trial 2 diverged." in verdict(results).sentence
    assert results.best is not None
    assert results.best["trial"] == 0


def test_better_on_test_rows_and_worse_in_validation_is_no_answer(tmp_path: Path):
    writer = searched(tmp_path)
    choose(writer)
    judge(writer, [-0.3, -0.31, -0.29], valid=1.95)
    results = writer.load()
    assert verdict(results).kind == "undecided"
    assert "On the validation split, however, the default is better." in verdict(results).sentence
    assert results.best is not None
    assert results.best["trial"] == 0


def test_few_rows_widen_the_interval(tmp_path: Path):
    """Three seeds agree to a hundredth; that five rows do not is known all the same."""
    for rows, kind in ((400, "better"), (5, "undecided")):
        writer = searched(tmp_path / str(rows))
        choose(writer)
        judge(writer, [-0.3, -0.31, -0.29], rows=rows, row_noise=1.0)
        results = writer.load()
        assert results.evidence is not None
        assert results.evidence.rows == rows
        assert decided(results) == kind
    assert "5 test rows are too few for a difference of this size" in verdict(results).sentence


def test_nothing_is_better_that_does_not_beat_naming_one_class(tmp_path: Path):
    """Random labels: a config may well be nearer to the classes' shares than the default."""
    constant = always_the_most_frequent([30, 10], [15, 5])["loss"]
    for by, kind in ((-0.3, "better"), (0.05, "not better")):
        writer = searched(tmp_path / kind)
        writer.run.append_event(STARTED)
        choose(writer)
        for seed in (3, 4, 5):
            writer.again(0, seed, 1, 1.9, constant + 0.5)
            writer.again(2, seed, 1, 1.6, constant + by + seed / 1000)
        found = verdict(writer.load())
        assert found.kind == kind
    assert found.headline == "Nothing beats always naming the most frequent class"
    assert "does not beat always naming the most frequent class (loss 0.562)" in found.sentence


def test_only_a_task_that_knows_its_frequencies_is_compared_with_them(tmp_path: Path):
    """Those are of a cross-entropy; another task with classes may measure another loss."""
    writer = searched(tmp_path)
    writer.run.append_event(STARTED | {"task": "regression", "metric": "r2"})
    choose(writer)
    judge(writer, [-0.1, -0.05, -0.2])
    results = writer.load()
    assert results.evidence is not None
    assert results.evidence.constant is None
    assert results.constants("test") == {}
    assert "most frequent" not in summary(results)
    assert "It rests on 20 rows of the test split, which is few." in verdict(results).sentence


def test_runs_of_before_looks_share_the_level_among_their_configs(tmp_path: Path):
    writer = searched(tmp_path)
    for seed, noise in ((1, 0.0), (2, 0.01), (3, -0.01)):
        writer.again(0, seed, None, 1.9, 2.0)
        for of, valid in ((1, 1.8), (2, 1.6), (3, 1.7)):
            writer.again(of, seed, None, valid, 1.7 + of / 100 + noise)
    results = writer.load()
    assert results.evidence is not None
    assert results.evidence.trial == 2
    assert results.evidence.gap.level == pytest.approx(0.05 / 3)
    assert verdict(results).kind == "better"


def test_no_better_than_the_default_is_said_of_flat_losses(tmp_path: Path):
    flat = load(write_run(tmp_path / "flat", gain=0, confirm_seeds=3, diverge=0))
    assert verdict(flat).kind in ("not better", "undecided")
    steep = load(write_run(tmp_path / "steep", trials=30, confirm_seeds=3))
    assert verdict(steep).kind == "better"


# ------------------------------------------------------------------------------------ the baseline


def test_the_better_default_is_what_answers_are_stated_against(tmp_path: Path):
    writer = Writer(tmp_path)
    writer.trial(0, 2.0, "default")
    writer.trial(1, 1.8, "default")
    writer.trial(2, 1.5)
    results = writer.load()
    assert results.baselines == [0, 1]
    assert results.default is not None
    assert results.default["trial"] == 1
    found = verdict(results)
    assert found.kind == "undecided"
    assert "the default with a warmup of a tenth loss 1.800" in found.sentence
    assert "so part of it may be luck" in found.sentence
    text = " ".join(summary(results).split())
    assert (
        "the documented default loss 2.000, accuracy 0.500; the default with a warmup of a tenth"
        in text
    )


def test_few_validation_rows_are_said_without_a_confirmation(tmp_path: Path):
    writer = searched(tmp_path)
    writer.run.append_event(STARTED | {"data": CLASSES | {"judged": 5}})
    assert "It rests on 5 rows of the validation split" in verdict(writer.load()).sentence


def test_a_default_that_diverged_and_a_search_without_any_end(tmp_path: Path):
    writer = Writer(tmp_path)
    writer._one(0, {"origin": "default"}, {}, 9.0, "diverged")
    assert verdict(writer.load()).kind == "none"
    assert verdict(writer.load()).exit_code == 1
    assert "no best config and no prompts" in verdict(writer.load()).sentence
    writer.trial(1, 1.5)
    assert "default diverged" in verdict(writer.load()).sentence
    assert verdict(writer.load()).exit_code == 0


def test_the_classes_are_counted_where_the_answer_stands(tmp_path: Path):
    writer = searched(tmp_path)
    writer.run.append_event(STARTED)
    results = writer.load()
    for text in (" ".join(summary(results).split()), report_page(results)):
        assert "Training rows by class: cat 30, dog 10." in text
        assert "Always naming the most frequent class (cat): validation loss 0.562" in text


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_higher_is_better_is_judged_the_right_way_round(tmp_path: Path, name: str):
    writer = searched(tmp_path, objective=name)
    for of in (1, 2, 3):
        for seed in (1, 2):
            writer.again(of, seed, 0, 1.8, **{name: 0.9 if of == 2 else 0.8})
    for seed in (3, 4, 5):
        writer.again(0, seed, 1, 1.9, 2.0, **{name: 0.6, f"test_{name}": 0.6 + seed / 1000})
        writer.again(2, seed, 1, 1.9, 2.0, **{name: 0.9, f"test_{name}": 0.8 + seed / 1000})
    results = writer.load()
    assert results.chosen == 2
    found = verdict(results)
    assert found.kind == "better"
    assert f"a mean test {name} of 0.804" in found.sentence
    assert "a paired difference of +0.200 (95% interval +0.2" in found.sentence
