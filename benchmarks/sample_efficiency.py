"""How many tokens a search needs to find what plain random search finds.

    python -m benchmarks.sample_efficiency [--seeds 20]

Four searches on the demo task (docstring -> package, the demo model, 50 steps of 8 rows), each
with many seeds:

    random       random configs, every trial to its end
    TPE          Optuna's TPE, every trial to its end
    random+ASHA  random configs, bad trials stopped early
    TPE+ASHA     what tune_app does by default

The learning curves are real: every config that a search asks for is trained, once, and its curve
kept in results/curves.csv, so that hundreds of searches share them. For that the learning rate is
rounded to a sixth of a decade. Sampler and scheduler are the very objects that a search uses; only
the clock is simulated: 8 trials at once, each advancing by one evaluation in turn.

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

from tune_app.config import SearchConfig, TrialConfig
from tune_app.model_folder import model_folder
from tune_app.reports import evaluation_steps
from tune_app.search_space import load_space
from tune_app.searcher import METRIC, StudySearcher, build_sampler
from tune_app.tuning import build_trial_scheduler

STEPS, BATCH, TRIALS, AT_ONCE = 50, 8, 24, 8
RESULTS = Path(__file__).parent / "results"
SPACE = """
parameters:
  lr: {space: loguniform, lower: 1.0e-4, upper: 1.0e-1}
  scheduler: {space: choice, categories: [linear, cosine, constant_with_warmup]}
  warmup_steps: {space: qrandint, lower: 0, upper: 40, q: 10}
"""
LR_PER_DECADE = 6
ARMS = {
    "random": ("random", "none"),
    "TPE": ("tpe", "none"),
    "random+ASHA": ("random", "asha"),
    "TPE+ASHA": ("tpe", "asha"),
}

Key = tuple[float, str, int]
Curve = list[tuple[float, int]]  # (objective, tokens so far) at each evaluation


def key_of(config: TrialConfig) -> Key:
    exponent = round(math.log10(config.lr) * LR_PER_DECADE) / LR_PER_DECADE
    return round(10**exponent, 8), config.scheduler, config.warmup_steps


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
        """Trains every config of the grid that is not known yet."""
        decades = range(-4 * LR_PER_DECADE, -1 * LR_PER_DECADE + 1)
        lrs = [round(10 ** (i / LR_PER_DECADE), 8) for i in decades]
        grid = itertools.product(
            lrs, ["linear", "cosine", "constant_with_warmup"], range(0, 41, 10)
        )
        missing = [key for key in grid if key not in self.known]
        if not missing:
            return
        from transformers import AutoTokenizer

        from tune_app.backbones.local import LocalBackbone
        from tune_app.backbones.packer import Packer
        from tune_app.prompts import PromptTunedModel
        from tune_app.tasks import load_task_data
        from tune_app.training import TrainingRun

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
                    packer.backbone, packer.run, data.task, len(data.class_names), config
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

    trial_id: str

    def __str__(self) -> str:
        return self.trial_id


def search(sampler: str, scheduler: str, seed: int, curves: Curves, budget: int) -> Curve:
    """One search until `budget` tokens; (best objective so far, tokens so far) at each report."""
    config = SearchConfig(steps=STEPS, batch_size=BATCH, seed=seed)
    study_searcher = StudySearcher(
        load_space(str(RESULTS / "space.yaml")),
        config.base_trial(),
        study=optuna.create_study(direction="minimize"),
        sampler=build_sampler(sampler, seed),
        settings={},
        stopping=lambda: False,
    )
    stopper = build_trial_scheduler(scheduler, STEPS)
    stopper.set_search_properties(METRIC, "min")
    numbers = itertools.count()
    running: deque[tuple[StubTrial, Curve, int]] = deque()
    best, spent, trace = math.inf, 0, []
    while spent < budget:
        while len(running) < AT_ONCE:
            trial = StubTrial(f"trial-{next(numbers) + 1:03d}")
            job = study_searcher.suggest(trial.trial_id)["job"]
            stopper.on_trial_add(None, trial)
            running.append((trial, curves.known[key_of(TrialConfig.from_dict(job["trial"]))], 0))
        trial, curve, at = running.popleft()
        objective, tokens = curve[at]
        spent += tokens - (curve[at - 1][1] if at else 0)
        best = min(best, objective)
        trace.append((best, spent))
        diverged = at + 1 == len(curve) and at + 1 < len(evaluation_steps(STEPS))
        step = STEPS if diverged else evaluation_steps(STEPS)[at]
        result = {METRIC: objective, "step": step, "diverged": diverged}
        study_searcher.on_trial_result(trial.trial_id, result)
        decision = stopper.on_trial_result(None, trial, result)
        if at + 1 == len(curve) or decision == "STOP":
            study_searcher.on_trial_complete(trial.trial_id, result)
            stopper.on_trial_complete(None, trial, result)
        else:
            running.append((trial, curve, at + 1))
    return trace


def tokens_to(trace: Curve, target: float, most: int) -> int:
    return next((spent for best, spent in trace if best <= target), most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "space.yaml").write_text(SPACE)
    curves = Curves(RESULTS / "curves.csv")
    curves.train_missing()
    full = max(curve[-1][1] for curve in curves.known.values())
    budget = TRIALS * full
    traces = {
        arm: [search(*parts, seed, curves, 2 * budget) for seed in range(args.seeds)]
        for arm, parts in ARMS.items()
    }
    ends = [min(best for best, spent in trace if spent <= budget) for trace in traces["random"]]
    target = statistics.median(ends)
    optimum = min(objective for curve in curves.known.values() for objective, _ in curve)
    print(f"{len(curves.known)} configs, {full} tokens in a full trial, {args.seeds} seeds")
    print(
        f"target: loss {target:.4f}, random search after {TRIALS} trials (optimum: {optimum:.4f})"
    )
    lines = [
        "| search | tokens to the target, median | range | full trials' worth | random / it |",
        "| --- | --- | --- | --- | --- |",
    ]
    base = None
    for arm, runs in traces.items():
        needed = sorted(tokens_to(trace, target, 2 * budget) for trace in runs)
        median = statistics.median(needed)
        base = base or median
        lines.append(
            f"| {arm} | {median:,.0f} | {needed[0]:,} to {needed[-1]:,} | {median / full:.1f} "
            f"| {base / median:.1f} |"
        )
    print("\n".join(lines))
    (RESULTS / "sample_efficiency.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
