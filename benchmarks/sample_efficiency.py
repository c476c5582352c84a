"""How many tokens a search needs to find what plain random search finds.

    python -m benchmarks.sample_efficiency [--seeds 100]

Searches on the demo task (docstring -> package, the demo model, 50 steps of 8 rows), each with
many seeds:

    random          random configs, every trial to its end
    TPE             Optuna's TPE, every trial to its end
    random+ASHA     random configs, bad trials stopped early
    TPE+ASHA        tune_app with --sampler tpe, without a prior
    gp+ASHA         what tune_app does by default, without a prior
    +prior          the same with the default space's prior for the learning rate
    +wrong prior    the same with a prior that is centred two decades too low
    random+oracle   random configs, stopped by one who knows how each trial would end
    TPE+oracle      the same with TPE, which is told at once how they would have ended

The oracle stops a trial after its first evaluation unless it will reach the target. A rule that
sees losses alone knows less, so its figure is about the limit of early stopping.

The learning curves are real: every config that a search asks for is trained, once, and its curve
kept in results/curves.csv, so that hundreds of searches share them. For that the learning rate is
rounded to a sixth of a decade. Sampler and scheduler are the very objects that a search uses; only
the clock is simulated: as many trials at once as the command would run, each advancing by one
evaluation in turn.

The figure: training tokens until the validation loss that random search reaches with its whole
budget (24 full trials, median over the seeds) is first reported. A search that has not reached it
within twice that budget counts with twice the budget.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import optuna

from tune_app.models.folder import model_folder
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig, TrialConfig
from tune_app.run.trial_report import OBJECTIVE, Report, evaluation_steps
from tune_app.search.concurrency import trials_at_once
from tune_app.search.ray_tune.schedulers import build_trial_scheduler
from tune_app.search.study_trials import StudyTrials
from tune_app.search.trial_job import JOB, TrialJob
from tune_app.study.prior import NumberPrior
from tune_app.study.samplers import build_sampler
from tune_app.study.yaml_space import load_space

STEPS, BATCH, TRIALS = 50, 8, 24
AT_ONCE = trials_at_once(SearchConfig(), 4096)  # on the private swarm: 5
RESULTS = Path(__file__).parent / "results"
SPACE = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler: {space: choice, categories: [linear, cosine, constant_with_warmup]}
  warmup_steps: {space: qrandint, lower: 0, upper: 40, q: 10}
"""
LR_PER_DECADE = 6
PRIOR = NumberPrior(5e-3, 3.0)  # of search_spaces/default.yaml
WRONG_PRIOR = NumberPrior(5e-5, 3.0)


@dataclass(frozen=True)
class Arm:
    sampler: str
    scheduler: str
    prior: NumberPrior | None = None

    def build_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        space = load_space(str(RESULTS / "space.yaml"))
        return build_sampler(
            self.sampler, space.expecting({"lr": self.prior} if self.prior else {}), seed
        )


ARMS = {
    "random": Arm("random", "none"),
    "TPE": Arm("tpe", "none"),
    "random+ASHA": Arm("random", "asha"),
    "TPE+ASHA": Arm("tpe", "asha"),
    "TPE+ASHA+prior": Arm("tpe", "asha", PRIOR),
    "TPE+ASHA+wrong prior": Arm("tpe", "asha", WRONG_PRIOR),
    "gp+ASHA": Arm("gp", "asha"),
    "gp+ASHA+prior": Arm("gp", "asha", PRIOR),
    "gp+ASHA+wrong prior": Arm("gp", "asha", WRONG_PRIOR),
}
LIMITS = """\
Every search runs the documented default first. `random / it` compares medians.

What limits the figure:

- Few configs reach the target, and as many trials as run at once begin before one has ended. The
  last row is what remains if one evaluation told all that a whole trial does: about the limit of
  early stopping with TPE, at this number of trials at once.
- One evaluation does not tell it. Warmup and large learning rates make a loss worse before it gets
  better, so many of the best configs look bad at first; after three fifths of a trial they can be
  told, and most of its tokens are spent.
- The best lie close together, in learning rate and schedule, where TPE explores by chance.

What was tried, and a second task: [../README.md](../README.md#how-few-tokens-a-search-needs)."""
ORACLE_ARMS = {"random+oracle": Arm("random", "none"), "TPE+oracle": Arm("tpe", "none")}

Key = tuple[float, str, int]
Curve = list[tuple[float, int]]  # (objective, tokens so far) at each evaluation


def key_of(config: TrialConfig) -> Key:
    exponent = round(math.log10(config.lr) * LR_PER_DECADE) / LR_PER_DECADE
    return round(10**exponent, 8), config.scheduler, config.num_warmup_steps()


class Curves:
    """Real learning curves by config, trained in packs on the local backbone and kept."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[Key, Curve] = {}
        if file.exists():
            for row in csv.DictReader(file.open()):
                key = (float(row["lr"]), row["scheduler"], int(row["warmup_steps"]))
                self.known.setdefault(key, []).append((float(row["objective"]), int(row["tokens"])))

    def train_missing(self) -> None:
        """Trains every config of the grid that is not known yet, and the documented default."""
        decades = range(-4 * LR_PER_DECADE, -1 * LR_PER_DECADE + 1)
        lrs = [round(10 ** (i / LR_PER_DECADE), 8) for i in decades]
        grid = itertools.product(
            lrs, ["linear", "cosine", "constant_with_warmup"], range(0, 41, 10)
        )
        default = key_of(SearchConfig(steps=STEPS).base_trial())
        missing = [key for key in [*grid, default] if key not in self.known]
        if not missing:
            return
        from transformers import AutoTokenizer

        from tune_app.backbones.local import LocalBackbone
        from tune_app.backbones.packer import Packer
        from tune_app.tasks.loading import load_task_data
        from tune_app.train.loop import TrainingRun
        from tune_app.train.prompt_model import PromptTunedModel

        model = str(model_folder("demo"))
        data = load_task_data(SearchConfig(), AutoTokenizer.from_pretrained(model))
        packer = Packer(LocalBackbone(model, device="cpu", dtype="float32"))

        def train(key: Key) -> tuple[Key, Curve]:
            config = TrialConfig(
                lr=key[0], scheduler=key[1], warmup_steps=key[2], steps=STEPS, batch_size=BATCH
            )
            curve: Curve = []
            with packer.member():
                model = PromptTunedModel(
                    packer.backbone, packer.run, data.task, data.outputs, config
                )
                run = TrainingRun(model, data, config)
                run.train(lambda report: curve.append((report.objective, report.tokens)))
            return key, curve

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done, (key, curve) in enumerate(pool.map(train, missing), 1):
                self.known[key] = curve
                self._append(key, curve)
                if done % 20 == 0:
                    print(f"trained {done} of {len(missing)} configs", flush=True)
        packer.close()

    def _append(self, key: Key, curve: Curve) -> None:
        is_new = not self.file.exists()
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["lr", "scheduler", "warmup_steps", "objective", "tokens"])
            writer.writerows([*key, objective, tokens] for objective, tokens in curve)


@dataclass
class StubTrial:
    """As much of Ray's Trial as its schedulers look at."""

    job: TrialJob

    @property
    def config(self) -> dict[str, TrialJob]:
        return {JOB: self.job}

    @property
    def trial_id(self) -> str:
        return self.job.name

    def __str__(self) -> str:
        return self.trial_id


@dataclass(frozen=True)
class Seen:
    """What a search knows after one more evaluation."""

    best: float  # objective, the least so far
    tokens: int  # that all trials together have trained on
    best_of_first: float  # the least of its first TRIALS trials


def search(arm: Arm, seed: int, curves: dict[Key, Curve], budget: int) -> list[Seen]:
    """One search until `budget` tokens: what it knows after each evaluation."""
    config = SearchConfig(steps=STEPS, batch_size=BATCH, seed=seed)
    space, study = load_space(str(RESULTS / "space.yaml")), optuna.create_study()
    for first in space.first_trials(config.base_trial(), None)[:1]:  # the documented default
        first.enqueue(study)
    study.sampler = arm.build_sampler(seed)
    study_trials = StudyTrials(study, space, config.base_trial(), RunDir("."), stop=lambda: False)
    stopper = build_trial_scheduler(arm.scheduler, STEPS)
    stopper.set_search_properties(OBJECTIVE, "min")
    running: deque[tuple[StubTrial, Curve, int]] = deque()
    spent, trace = 0, []
    best = best_of_first = math.inf
    while spent < budget:
        while len(running) < AT_ONCE:
            trial = StubTrial(study_trials.ask())
            stopper.on_trial_add(None, trial)
            running.append((trial, curves[key_of(trial.job.config)], 0))
        trial, curve, at = running.popleft()
        objective, tokens = curve[at]
        spent += tokens - (curve[at - 1][1] if at else 0)
        best = min(best, objective)
        if trial.job.number < TRIALS:
            best_of_first = min(best_of_first, objective)
        trace.append(Seen(best, spent, best_of_first))
        diverged = at + 1 == len(curve) and at + 1 < len(evaluation_steps(STEPS))
        step = STEPS if diverged else evaluation_steps(STEPS)[at]
        report = Report(step=step, objective=objective, diverged=diverged)
        result = report.flat()
        study_trials.report(trial.job.number, report)
        decision = stopper.on_trial_result(None, trial, result)
        if at + 1 == len(curve) or decision == "STOP":
            study_trials.end(trial.job.number, report)
            stopper.on_trial_complete(None, trial, result)
        else:
            running.append((trial, curve, at + 1))
    return trace


def stopped_by_oracle(curves: dict[Key, Curve], target: float) -> dict[Key, Curve]:
    """The curves as the oracle leaves them: what misses the target ends at once, and its final
    loss is known."""
    return {
        key: curve
        if min(objective for objective, _ in curve) <= target
        else [(curve[-1][0], curve[0][1])]
        for key, curve in curves.items()
    }


def tokens_to(trace: list[Seen], target: float, most: int) -> int:
    return next((seen.tokens for seen in trace if seen.best <= target), most)


def best_within(trace: list[Seen], budget: int) -> float:
    return min(seen.best for seen in trace if seen.tokens <= budget)


def table(arms: dict[str, list[list[Seen]]], target: float, full: int) -> list[str]:
    """A row for each arm; `full` are the tokens of a full trial."""
    lines = [
        "| search | tokens to the target: median | mean | range | median, in full trials "
        f"| random / it | loss after the tokens of {TRIALS} full trials | loss after {TRIALS} "
        "trials |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    budget, base = TRIALS * full, None
    for arm, traces in arms.items():
        needed = sorted(tokens_to(trace, target, 2 * budget) for trace in traces)
        median = statistics.median(needed)
        base = base or median
        by_tokens = statistics.mean(best_within(trace, budget) for trace in traces)
        by_trials = statistics.mean(trace[-1].best_of_first for trace in traces)
        lines.append(
            f"| {arm} | {median:,.0f} | {statistics.mean(needed):,.0f} "
            f"| {needed[0]:,} to {needed[-1]:,} | {median / full:.1f} | {base / median:.1f} "
            f"| {by_tokens:.4f} | {by_trials:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=100)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "space.yaml").write_text(SPACE)
    recorded = Curves(RESULTS / "curves.csv")
    recorded.train_missing()
    curves = recorded.known
    full = max(curve[-1][1] for curve in curves.values())
    budget = TRIALS * full

    def run(arm: Arm, curves: dict[Key, Curve]) -> list[list[Seen]]:
        return [search(arm, seed, curves, 2 * budget) for seed in range(args.seeds)]

    arms = {name: run(arm, curves) for name, arm in ARMS.items()}
    # A loss that half of the random searches do reach; a mean of two losses may be nobody's.
    target = statistics.median_high(best_within(trace, budget) for trace in arms["random"])
    known_ends = stopped_by_oracle(curves, target)
    arms |= {name: run(arm, known_ends) for name, arm in ORACLE_ARMS.items()}
    good = sum(min(objective for objective, _ in curve) <= target for curve in curves.values())
    lines = [
        f"Target: loss {target:.4f}, random search after {TRIALS} full trials. {good} of the "
        f"{len(curves)} configs reach it; the best ends at "
        f"{min(curve[-1][0] for curve in curves.values()):.4f}. A full trial is {full:,} tokens, "
        f"{AT_ONCE} trials run at once, {args.seeds} seeds; losses are means over them.",
        "",
        *table(arms, target, full),
        "",
        LIMITS,
    ]
    print("\n".join(lines))
    (RESULTS / "sample_efficiency.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
