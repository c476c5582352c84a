"""Population-based training: what it tries, whom it lets go on from whom, and a whole search that
is killed, ends at its budget, goes on, and whose schedule of configs trains again alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
from ray.tune.schedulers import TrialScheduler

from benchmarks.kill_and_resume import Search, events
from tune_app import train
from tune_app.checks import check_everything
from tune_app.config import ConfigError, SearchConfig
from tune_app.explore import check_population, explore
from tune_app.optuna_space import contains
from tune_app.population import Population
from tune_app.results import load, summary
from tune_app.results.tables import best_yaml
from tune_app.run_dir import RunDir
from tune_app.search import main
from tune_app.search_space import load_space
from tune_app.searcher import METRIC
from tune_app.trial_config import CHANGEABLE, TrialConfig
from tune_app.trial_job import trial_name

# ------------------------------------------------------------------------------- what it tries


@pytest.mark.parametrize("name", ["default", "conditional", "deep"])
def test_what_is_tried_lies_in_the_space(name: str) -> None:
    space, base = load_space(name), SearchConfig(steps=60).base_trial()
    rng = random.Random(3)
    config = space.default_config(base)
    seen: dict[str, set[Any]] = {}
    for _ in range(300):
        new = explore(config, 12, space, base, rng)
        now = new.at(12)
        assert now.check() == []
        assert new.at(11) == config.at(11)
        assert now != config.at(11)
        assert {name for _, name, _ in new.changes} <= set(CHANGEABLE)
        values: dict[str, Any] = {}
        for parameter in space.parameters:
            value = getattr(now, parameter.name)
            if parameter.active(values):
                values[parameter.name] = value
                seen.setdefault(parameter.name, set()).add(value)
                if parameter.name in CHANGEABLE:
                    assert contains(parameter.distribution, value), (parameter, value)
            elif parameter.name in CHANGEABLE:
                assert value == getattr(base, parameter.name), parameter
        config = now  # a walk through the space
    for name in set(seen) & set(CHANGEABLE):
        assert len(seen[name]) > 1, name


def test_what_is_tried_follows_from_the_generator_alone() -> None:
    space, base = load_space("conditional"), SearchConfig().base_trial()
    state = random.getstate()
    tried = [explore(base, 12, space, base, random.Random(seed)) for seed in (1, 1, 2)]
    assert tried[0] == tried[1] != tried[2]
    assert random.getstate() == state


def test_a_neighbour_is_rays(tmp_path: Path) -> None:
    """Numbers are multiplied by 0.8 or 1.2, listed ones take the next; a quarter is drawn anew."""
    file = tmp_path / "space.yaml"
    file.write_text(
        "parameters:\n"
        "  lr: {space: loguniform, lower: 1.0e-6, upper: 1.0}\n"
        "  weight_decay: {space: choice, categories: [0.0, 0.1, 0.2, 0.3, 0.4]}\n"
        "  warmup_steps: {space: qrandint, lower: 0, upper: 100, q: 10}\n"
        "  scheduler: {space: choice, categories: [linear, cosine]}\n"
    )
    space, base, rng = load_space(str(file)), SearchConfig().base_trial(), random.Random(0)
    now = replace(base, lr=1e-2, weight_decay=0.2, warmup_steps=10)
    new = [explore(now, 12, space, base, rng).at(12) for _ in range(1000)]

    near = [c.lr for c in new if c.lr == pytest.approx(8e-3) or c.lr == pytest.approx(1.2e-2)]
    assert 700 < len(near) < 800
    assert 3 * 3 / 4 * 300 < sum(c.weight_decay in (0.1, 0.3) for c in new) < 900
    assert sum(c.warmup_steps in (0, 20) for c in new) > 700  # a step of the grid at least
    assert 50 < sum(c.scheduler == "cosine" for c in new) < 200  # words stay, unless drawn anew


def test_a_lineage_keeps_what_was_before_and_drops_what_would_come() -> None:
    space, base = load_space("default"), SearchConfig().base_trial()
    donor = replace(base, changes=((12, "lr", 0.02), (24, "lr", 0.03), (36, "lr", 0.04)))
    new = explore(donor, 24, space, base, random.Random(0))
    assert new.at(23) == donor.at(23)
    assert new.changes[0] == (12, "lr", 0.02)
    assert {step for step, _, _ in new.changes} == {12, 24}
    assert new.at(24).lr != 0.03


# --------------------------------------------------------------------------------- who and whom


@dataclass
class Trial:
    """As much of Ray's Trial as its scheduler looks at."""

    number: int
    config: dict[str, Any]
    status: str = "RUNNING"
    experiment_tag: str = ""
    last_result: dict[str, Any] = field(default_factory=dict)
    run_metadata: Any = None

    def __post_init__(self) -> None:
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def __str__(self) -> str:
        return trial_name(self.number)

    def __hash__(self) -> int:
        return self.number

    trial_id = property(__str__)

    def is_finished(self) -> bool:
        return self.status in ("ERROR", "TERMINATED")

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag


class Controller:
    """As much of Tune's: it only writes down who trains on."""

    search_alg = None

    def __init__(self, trials: list[Trial]) -> None:
        self.trials, self.trained = trials, list[int]()
        self._tune_controller = self

    def get_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        assert not should_checkpoint
        trial.status = "PAUSED"

    def _schedule_trial_train(self, trial: Trial) -> None:
        self.trained.append(trial.number)


SPACE = load_space("default")
BASE = SearchConfig(steps=50).base_trial()


class Rounds:
    """A population of 8 over a fake controller."""

    def __init__(self, decided: int = 0, seed: int = 0) -> None:
        configs = [replace(BASE, lr=1e-3 * (i + 1)).to_dict() for i in range(8)]
        self.trials = [Trial(i, {"job": {"number": i, "trial": configs[i]}}) for i in range(8)]
        self.controller, self.told = Controller(self.trials), []
        self.population = Population(
            *(SPACE, BASE),
            size=8,
            seed=seed,
            decided=decided,
            changed=lambda step, changes: self.told.append((step, changes)),
        )
        self.population.set_search_properties(METRIC, "min")
        for trial in self.trials:
            self.population.on_trial_add(self.controller, trial)

    def report(self, number: int, step: int, loss: float) -> str:
        result = {METRIC: loss, "step": step}
        return self.population.on_trial_result(self.controller, self.trials[number], result)

    def turn(self) -> Trial | None:
        return self.population.choose_trial_to_run(self.controller)


def test_all_wait_and_then_the_worst_quarter_goes_on_from_the_best() -> None:
    rounds = Rounds()
    for number in range(7):
        assert rounds.report(number, 10, 2.0 - number / 10) == TrialScheduler.NOOP
        assert rounds.turn() is None
    assert rounds.controller.trained == []
    rounds.report(7, 10, 1.95)

    # The default, trial 0, is the worst but goes on as itself; then comes trial 7.
    assert rounds.turn() is rounds.trials[7]
    assert sorted(rounds.controller.trained) == [0, 1, 2, 3, 4, 5, 6]
    ((step, (change,)),) = rounds.told
    assert (step, change["trial"]) == (10, 7)
    assert change["of"] in (5, 6)
    job = rounds.trials[7].config["job"]
    assert job["number"] == 7
    assert job["begin"] == {"trial": change["of"], "step": 10}
    config = TrialConfig.from_dict(job["trial"])
    assert config.at(9) == replace(BASE, lr=1e-3 * (change["of"] + 1))
    assert config.changes
    assert config.to_dict() == change["config"]
    # It repeats the last report of the state that it goes on from, and then trains on.
    assert rounds.report(7, 10, 1.4) == TrialScheduler.CONTINUE


def test_the_default_is_a_donor_like_any_other() -> None:
    rounds = Rounds()
    for number in range(8):
        rounds.report(number, 10, 1.0 + number)
    rounds.turn()
    assert {change["of"] for change in rounds.told[0][1]} <= {0, 1}
    assert {change["trial"] for change in rounds.told[0][1]} == {6, 7}


def test_nobody_waits_for_a_trial_that_has_ended() -> None:
    rounds = Rounds()
    for number in range(7):
        rounds.report(number, 10, 2.0)
    rounds.turn()
    assert rounds.told == []
    rounds.trials[7].status = "TERMINATED"  # it has diverged on the way
    rounds.turn()
    assert [step for step, _ in rounds.told] == [10]
    assert 7 not in rounds.controller.trained


def test_a_trial_that_has_failed_once_is_waited_for() -> None:
    rounds = Rounds()
    for number in range(8):
        if number == 7:  # as Ray does where it starts a trial again
            rounds.population.on_trial_add(rounds.controller, rounds.trials[3])
            rounds.trials[3].status = "PENDING"
        rounds.report(number, 10, 2.0)
    rounds.turn()
    assert rounds.told == []
    rounds.trials[3].status = "RUNNING"
    rounds.report(3, 10, 2.0)
    rounds.turn()
    assert [step for step, _ in rounds.told] == [10]


def test_a_population_that_goes_on_holds_no_round_twice() -> None:
    rounds = Rounds(decided=10)
    for number in range(8):
        assert rounds.report(number, 10, 1.0 + number) == TrialScheduler.CONTINUE
    rounds.turn()
    assert rounds.told == []
    for number in range(8):
        rounds.report(number, 20, 1.0 + number)
    rounds.turn()
    assert [step for step, _ in rounds.told] == [20]


def test_rounds_follow_from_seed_and_losses() -> None:
    def told(seed: int) -> list[Any]:
        rounds = Rounds(seed=seed)
        for number in random.sample(range(8), 8):  # whoever comes first
            rounds.report(number, 10, 1.0 + number)
        rounds.turn()
        return rounds.told

    assert told(0) == told(0)
    assert any(told(0) != told(seed) for seed in range(1, 4))


# ------------------------------------------------------------------------------ what it cannot do

PBT = SearchConfig(scheduler="pbt", trials=8)


@pytest.mark.parametrize(
    ("config", "space", "said"),
    [
        (replace(PBT, trials=3), "", "--trials: --scheduler pbt needs 4 or more, got 3."),
        (replace(PBT, concurrency=4), "", "--concurrency: with --scheduler pbt all 8 trials"),
        (replace(PBT, steps=1), "", "--steps: --scheduler pbt compares trials on the way"),
        (PBT, "batch_size: {space: randint, lower: 2, upper: 8}", "nothing of what it samples (b"),
        (PBT, "steps: {space: randint, lower: 9, upper: 20}", "all trials have the same number"),
        (replace(PBT, trial={"steps": 9}), "", "all trials have the same number of steps"),
    ],
)
def test_what_it_cannot_do_is_said_before(
    tmp_path: Path, config: SearchConfig, space: str, said: str
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(f"parameters: {{{space or 'lr: {space: uniform, lower: 0.1, upper: 0.2}'}}}")
    found = check_population(config, load_space(str(file)))
    assert [message for message in found if said in message], found
    with pytest.raises(ConfigError) as caught:
        check_everything(replace(config, space=str(file), backbone="local"))
    assert set(found) <= set(caught.value.messages)


def test_a_python_space_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "space.py"
    file.write_text("def space(trial):\n    trial.suggest_float('lr', 0.001, 0.1)\n")
    (message,) = check_population(PBT, load_space(str(file)))
    assert "a Python space" in message


# -------------------------------------------------------------------------------- a whole search

TRIALS, STEPS = 6, 15
HOPELESS = """\
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 3.0e-2}
  weight_decay: {space: choice, categories: [0.0, 0.01, 0.1]}
fixed: {warmup_steps: 0}
enqueue: [{lr: 3.0e-2}, {lr: 3.0e-3}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """Killed after its first round, ended by its budget, and gone on with to its end."""
    folder = tmp_path_factory.mktemp("pbt")
    (folder / "space.yaml").write_text(HOPELESS)
    run = RunDir(folder / "run")
    first = Search(
        *("--scheduler=pbt", f"--space={folder / 'space.yaml'}", f"--trials={TRIALS}"),
        *(f"--steps={STEPS}", "--batch-size=4", "--confirm=0", "--confirm-seeds=1"),
        f"--out={run.path}",
    )
    assert first.wait_until(lambda: rounds_of(run))
    first.process.send_signal(signal.SIGKILL)
    first.wait()
    spent = next(e["tokens"] for e in events(run.path) if e["event"] == "report")  # of one trial
    budget = f"--token-budget={2.5 * spent * TRIALS:.0f}"  # between the second and third round
    second = Search("--resume", str(run.path), budget)
    assert second.wait() == 0, second.process.stderr.read()
    assert len(rounds_of(run)) == 2
    assert "RUNNING" not in {trial.state.name for trial in study(run).trials}
    third = Search("--resume", str(run.path), "--token-budget=1e9", "--confirm=2")
    assert third.wait() == 0, third.process.stderr.read()
    return run


def rounds_of(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in events(run.path) if event["event"] == "population_changed"]


def study(run: RunDir) -> optuna.Study:
    return optuna.load_study(study_name="tune_app", storage=f"sqlite:///{run.study_db}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_and_no_round_is_held_twice(run: RunDir) -> None:
    searched = pd.read_csv(run.trials_csv)
    assert set(searched["status"]) == {"finished"}
    assert [event["step"] for event in rounds_of(run)] == [3, 6, 9, 12]
    assert all(event["changed"] for event in rounds_of(run))
    assert all(change["trial"] != 0 for event in rounds_of(run) for change in event["changed"])
    told = {trial.number: trial for trial in study(run).trials}
    assert sorted(told) == list(range(TRIALS))
    results = load(run)
    for number, trial in told.items():
        assert trial.state.name == "COMPLETE"
        row = results.trials.set_index("trial").loc[number]
        assert trial.value == pytest.approx(row["objective"])
        assert (
            trial.user_attrs.get("trained", trial.user_attrs["config"]) == results.configs[number]
        )
    began = {e["trial"]: e["config"] for e in reversed(events(run.path)) if "config" in e}
    assert told[1].params["lr"] == 0.03 == began[1]["lr"]
    assert results.configs[1]["lr"] < 0.03  # it has gone on from another
    assert "changes" not in results.configs[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tokens_are_those_that_were_computed(run: RunDir) -> None:
    """Same batches for all, so each trial's are the default's, whomever it has gone on from."""
    tokens = pd.read_csv(run.trials_csv).query("origin != 'confirm'")["tokens"]
    assert tokens.nunique() == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_schedule_of_configs_trains_again_alone(run: RunDir, tmp_path: Path) -> None:
    results = load(run)
    rows = results.finished
    number = next(int(n) for n in rows["trial"] if "changes" in results.configs[int(n)])
    (tmp_path / "best.yaml").write_text(best_yaml(results, number))
    again = RunDir(tmp_path / "again")
    told = [f"--config={tmp_path / 'best.yaml'}", f"--out={again.path}", "--quiet"]

    assert train.main(told) == 0

    changes = results.configs[number]["changes"]
    since = changes[-1][0]
    history = results.history.query(f"trial == {number} and step >= {since}")
    alone = load(again).history.query(f"step >= {since}")
    assert list(alone["step"]) == list(history["step"])
    for column in ("eval_loss", "learning_rate"):
        assert list(alone[column]) == pytest.approx(list(history[column]), rel=1e-5)
    card = (again.prompts / "README.md").read_text()
    assert f"after step {since}: " in card


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_results_say_what_changed(run: RunDir) -> None:
    results = load(run)
    confirmed = [e for e in events(run.path) if e["event"] == "trial_started" and "of" in e]
    assert len(confirmed) == 3
    assert any("changes" in event["config"] for event in confirmed)
    table = pd.read_csv(run.trials_csv).set_index("trial")
    assert table["changes"].notna()[1]
    text = summary(results)
    assert "Importance of the hyperparameters: not of a population" in text
    assert "--trials" not in text  # a population keeps its size
    assert "not of a population" in run.report_html.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--trials=9"], "--trials: a population keeps its size; the run began with 6, now 9."),
        (["--scheduler=asha"], "--scheduler: a population (pbt) goes on as one"),
        (["--scheduler=none", "--allow-changed-space"], "--scheduler: a population (pbt)"),
    ],
)
def test_what_a_population_cannot_become(
    run: RunDir, changed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(run.path), *changed]) == 2
    assert said in capsys.readouterr().err
