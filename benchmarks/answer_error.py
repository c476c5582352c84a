"""How often the answer of a search is wrong, and how often it finds what is there.

    python -m benchmarks.answer_error --searches 40 --out FOLDER

Real trainings on a Llama of two small layers, one after the other in this process: the trials of a
search, then what `confirm_plan` asks for, judged by `verdict`. Only Ray, packing and the sampler
are left out: learning rates are drawn from the whole range, and no trial is stopped early.

- `random`: labels are drawn by a coin, so no config is better than any other in what it is for.
- `learnable`: the label follows from the text in four of five rows. The default, with its learning
  rate of 1e-3, hardly learns that in so few steps; larger rates do.

Each search has data, seeds and learning rates of its own.

`--simulated` draws losses by a formula instead, and leaves out everything but choosing and judging:
many searches in seconds. Then `learnable` is configs that are better by --gap nats.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tune_app.backbones.local import LocalBackbone
from tune_app.backbones.packer import run_alone
from tune_app.report.confirmation import Evidence
from tune_app.report.evidence import interval, level_of, next_look
from tune_app.report.results import load
from tune_app.report.verdict import decide, verdict
from tune_app.run import test_rows
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import SearchConfig
from tune_app.run.trial_config import TrialConfig
from tune_app.search.confirm_plan import next_step
from tune_app.search.trial_job import confirmation_number
from tune_app.tasks.classification import CLASSIFICATION
from tune_app.tasks.data import Dataset
from tune_app.tasks.objectives import LOSS
from tune_app.train.loop import TrainingRun, test_metrics
from tune_app.train.prompt_model import PromptTunedModel

VOCAB, ROW = 12, 6
ROWS = {"train": 400, "valid": 128, "test": 200}
RATES = (3e-3, 2e-2)
BASE = TrialConfig(steps=45, prompt_length=2, batch_size=8)
TRIALS = 8


class Data:
    """As much of TaskData as training looks at."""

    task = CLASSIFICATION
    outputs = 2

    def __init__(self, learnable: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for split, rows in ROWS.items():
            tokens = torch.randint(3, VOCAB, (rows, ROW), generator=generator)
            coin = torch.rand(rows, generator=generator)
            labels = coin < 0.5
            if learnable:
                labels = (tokens[:, -1] < VOCAB // 2) ^ (coin < 0.2)
            dataset = Dataset(tokens.tolist(), labels.long().tolist())
            setattr(self, split, dataset)
            if split == "valid":
                self.judged = dataset

    def summary(self) -> dict[str, object]:
        counts = {
            split: getattr(self, split).labels_N.bincount(minlength=2).tolist() for split in ROWS
        }
        return {
            "rows": ROWS,
            "judged": ROWS["valid"],
            "class_names": ["no", "yes"],
            "class_counts": counts,
            "constant_answer": "the more frequent one",
        }


def simulated(gap: float, seed: int, seeds: int, tested: int) -> tuple[str, int]:
    """The same for losses by formula, in nats, of two configs that are better than the default by
    `gap`. Deviations of a paired difference as runs of the demo task have them: 0.03 of the seeds,
    0.6 of the rows, and 0.6 of each row in each run."""
    generator = np.random.default_rng([seed, 7])
    config = SearchConfig(confirm_seeds=seeds)

    def gaps(seeds: int, rows: int, row_R: np.ndarray) -> np.ndarray:
        own_S1 = generator.normal(0, 0.03, (seeds, 1))
        return gap + own_S1 + row_R + generator.normal(0, 0.6, (seeds, rows))

    rows_R = {c: generator.normal(0, 0.6, tested) for c in range(config.confirm)}
    valid_R = {c: generator.normal(0, 0.6, ROWS["valid"]) for c in range(config.confirm)}
    means = {c: gaps(2, ROWS["valid"], valid_R[c]).mean() for c in valid_R}
    chosen = min(means, key=means.__getitem__)
    judged = gaps(config.confirm_seeds, tested, rows_R[chosen])
    valid_S = gaps(config.confirm_seeds, ROWS["valid"], valid_R[chosen]).mean(axis=1)
    pairs = look = 0
    answer = "undecided"
    while answer == "undecided" and next_look(pairs, config.confirm_seeds) > pairs:
        pairs, look = next_look(pairs, config.confirm_seeds), look + 1
        seen = judged[:pairs]
        evidence = Evidence(
            trial=2,
            baseline=0,
            split="test",
            gap=interval(seen.mean(axis=1), seen, level_of(look)),
            look=look,
            pairs=pairs,
            started=pairs,
            rows=tested,
            ahead=bool(valid_S[:pairs].mean() < 0),
            diverged=0,
            value=2.0 + gap,
            baseline_value=2.0,
        )
        answer = decide(evidence, LOSS.margin(2.0))
    return answer, pairs


def backbone(folder: Path) -> LocalBackbone:
    """Random weights, drawn wide enough that tokens look different."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return LocalBackbone(folder, device="cpu", dtype="float32")


def search(model: LocalBackbone, learnable: bool, seed: int, folder: Path) -> tuple[str, int]:
    """One search: the kind of its answer, and how many pairs it took."""
    data, run, config = Data(learnable, seed), RunDir(folder).create(), SearchConfig()
    run.write_atomic(run.search_yaml, f"confirm_seeds: {config.confirm_seeds}\n")
    write = run.append_event
    write({"event": "search_started", "task": "classification", "data": data.summary()})
    rates = torch.rand(TRIALS, generator=torch.Generator().manual_seed(seed))
    low, high = map(math.log, RATES)

    def trained(number: int, trial: TrialConfig, *, test: bool, **start: object) -> None:
        write({"event": "trial_started", "trial": number, "config": trial.to_dict()} | start)
        prompts = PromptTunedModel(model, partial(run_alone, model), data.task, 2, trial)
        training = TrainingRun(prompts, data, trial)  # type: ignore[arg-type]
        training.train(lambda report: None, evaluate_on_the_way=False)
        last = training.last_report
        assert last is not None
        rows: list[dict[str, float]] = []
        tested = test_metrics(prompts, data, rows) if test else {}  # type: ignore[arg-type]
        if test:
            run.write_atomic(run.test_rows(number), test_rows.packed(rows))
        write({"event": "report", "trial": number} | last.flat() | tested)
        status = "diverged" if last.diverged else "finished"
        write({"event": "trial_ended", "trial": number, "status": status})

    for number in range(TRIALS):
        trial = TrialConfig(**vars(BASE) | {"seed": 10_000 * seed})
        warmup = {0: BASE.steps, 1: math.ceil(BASE.steps / 10)}.get(number, 3)
        trial = TrialConfig(**vars(trial) | {"warmup_steps": warmup})
        if number > 1:
            rate = math.exp(low + (high - low) * float(rates[number]))
            trial = TrialConfig(**vars(trial) | {"lr": rate})
        origin = "default" if number < 2 else "suggested"
        trained(number, trial, test=False, origin=origin)
    config = SearchConfig(seed=10_000 * seed)
    while runs := next_step(load(run), config, extend=True).runs:
        for again in runs:
            number = confirmation_number(again.of, again.seed_index)
            start = {"origin": "confirm", "of": again.of, "look": again.look}
            trained(number, again.config, test=again.look > 0, **start)
    found = verdict(load(run))
    evidence = load(run).evidence
    pairs = 0 if evidence is None else evidence.pairs
    with (folder.parent / "answers.jsonl").open("a") as file:
        line = {"search": folder.name, "kind": found.kind, "pairs": pairs}
        file.write(json.dumps(line | {"text": f"{found.headline}. {found.sentence}"}) + "\n")
    return found.kind, pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--searches", type=int, default=40)
    parser.add_argument("--only", choices=["random", "learnable"])
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--gap", type=float, default=-0.2, help="of a simulated better config")
    parser.add_argument("--seeds", type=int, default=6, help="--confirm-seeds of a simulation")
    parser.add_argument("--test-rows", type=int, default=194, help="of a simulation")
    parser.add_argument("--out", type=Path, help="keeps the runs and answers.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        model = None if options.simulated else backbone(Path(scratch) / "model")
        for kind in [options.only] if options.only else ["random", "learnable"]:
            began, said, pairs = time.monotonic(), Counter[str](), Counter[int]()
            for seed in range(1, options.searches + 1):
                if model is None:
                    gap = options.gap if kind == "learnable" else 0.0
                    answer, took = simulated(gap, seed, options.seeds, options.test_rows)
                else:
                    folder = out / f"{kind}-{seed}"
                    answer, took = search(model, kind == "learnable", seed, folder)
                said[answer] += 1
                pairs[took] += 1
            answers = ", ".join(f"{amount} {answer}" for answer, amount in said.most_common())
            took_s = time.monotonic() - began
            print(f"{kind}: {answers}; pairs {dict(sorted(pairs.items()))} ({took_s:.0f} s)")


if __name__ == "__main__":
    main()
