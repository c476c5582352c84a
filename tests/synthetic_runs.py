"""Run directories with events as a search writes them, and no search: losses follow a formula.

The formula has what real ones have: a valley over log10(lr), noise from the seed, learning curves
that fall and level off, divergence at large learning rates, stops at rungs.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tune_app.report.write import write_all
from tune_app.run.run_dir import RunDir
from tune_app.run.search_config import TrialConfig

SAMPLED = ["lr", "scheduler", "warmup_steps", "weight_decay", "num_cycles"]
SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "constant_with_warmup", "polynomial"]
_BEST_LOG_LR = -2.05


def write_run(
    path: Path,
    trials: int = 16,
    *,
    seed: int = 0,
    task: str = "classification",
    diverge: float | None = None,
    stop: bool = True,
    confirm_seeds: int = 0,
    confirm: int = 3,
    gain: float = 1.0,
    ended: bool = True,
    reports: int = 10,
    looks: bool = True,
    data: dict[str, Any] | None = None,
) -> RunDir:
    """Writes search.yaml and events.jsonl of a search.

    looks: False writes the confirmation as runs of before have it: each of the best with all seeds.

    diverge: the share of trials that diverge, by large learning rates where None. gain: how much
    the losses depend on the learning rate (0: the default is as good as any).
    """
    run = RunDir(path).create()
    generator = np.random.default_rng(seed)
    metric = "accuracy" if task == "classification" else "perplexity"
    settings = {"space": "default", "task": task, "model": "demo", "trials": trials, "seed": seed}
    run.write_atomic(run.search_yaml, yaml.safe_dump({**settings, "out": str(path)}))
    clock = 1.79e9
    write = run.append_event
    write(
        {
            "event": "search_started",
            "time": clock,
            "trials": trials,
            "task": task,
            "metric": metric,
            "sampled": SAMPLED,
            "data": data,
        }
    )
    expected: dict[int, float] = {}  # without noise
    finals: dict[int, float] = {}
    configs: dict[int, dict[str, Any]] = {}
    for trial in range(trials):
        config = _config(trial, generator)
        configs[trial] = config
        write(_started(trial, config, "default" if trial == 0 else "suggested", clock))
        distance = math.log10(config["lr"]) - _BEST_LOG_LR
        diverges = distance > 1.0 if diverge is None else generator.random() < diverge
        expected[trial] = 1.735 + gain * 0.16 * distance**2
        final = expected[trial] + 0.012 * generator.standard_normal()
        status, reason = "finished", ""
        for index in range(1, reports + 1):
            step = 10 * index
            loss = final + (2.1 - final) * math.exp(-step / 22) + 0.01 * generator.standard_normal()
            if diverges and index == 4:
                status, reason = "diverged", f"eval_loss is nan at step {step}"
                loss = math.nan
            clock += 0.35
            figure = 0.62 - 0.2 * (loss - 1.6) if metric == "accuracy" else math.exp(loss)
            write(_report(trial, step, loss, metric, figure, config, clock))
            if status == "diverged":
                break
            if stop and not diverges and index == 3 and final > 1.95:
                status, reason = "stopped", "below the best third at step 30"
                break
        if trial % 29 == 11:
            status, reason = "failed", "RuntimeError: no server holds blocks 2:4 <b>&amp;</b>"
        if status == "finished":
            finals[trial] = loss
        if ended or trial < trials - 2:
            write(_ended(trial, status, reason, clock))
    if confirm_seeds and finals:
        best = [t for t in sorted(finals, key=finals.__getitem__) if t][:confirm]
        number, mean = trials, dict[int, float]()

        def again(of: int, seed: int, shared: float, look: int | None) -> float:
            nonlocal number, clock
            config = configs[of] | {"seed": 1000 * seed}
            event = {**_started(number, config, "confirm", clock), "of": of}
            write(event if look is None else event | {"look": look})
            loss = expected[of] + shared + 0.006 * generator.standard_normal()
            figure = 0.62 - 0.2 * (loss - 1.6) if metric == "accuracy" else math.exp(loss)
            clock += 3.5
            report = _report(number, 10 * reports, loss, metric, figure, config, clock)
            test = {"test_loss": loss + 0.02, f"test_{metric}": figure}
            write(report | (test if look != 0 else {}))
            write(_ended(number, "finished", "", clock))
            number += 1
            return loss

        def shared() -> float:  # what a seed does to every config alike
            return 0.02 * float(generator.standard_normal())

        if looks:
            common = [shared(), shared()]
            for of in best if len(best) > 1 else []:
                mean[of] = sum(again(of, i + 1, common[i], 0) for i in range(2)) / 2
            best = [min(best, key=lambda of: mean.get(of, 0.0))] if best else []
        for seed in range(3, 3 + confirm_seeds):
            common = [shared()]
            look = None if not looks else 1 if seed < 6 else 2
            for of in [0, *best]:
                again(of, seed, common[0], look)
    if ended:
        host = {
            "host": "host-0",
            "packs": 412,
            "requests": 824,
            "retries": 3,
            "rows": 52_000,
            "tokens": 2_900_000,
            "occupancy": 0.91,
            "rows_per_s": 121.4,
            "tokens_per_s": 5830.0,
            "wait_s": 31.2,
        }
        event = {"event": "search_ended", "time": clock + 1, "reason": "all trials done"}
        write(event | {"hosts": [host]})
    return run


def reported_run(path: Path, **options: Any) -> RunDir:
    """The same with its tables and its page."""
    run = write_run(path, **options)
    write_all(run)
    return run


def page_data(page: Path) -> dict[str, Any]:
    """What a report page gives to its script: the plots, and the texts for the mouse."""
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def _config(trial: int, generator: np.random.Generator) -> dict[str, Any]:
    if trial == 0:
        return TrialConfig().to_dict()
    scheduler = str(generator.choice(SCHEDULERS))
    return TrialConfig(
        lr=float(10 ** generator.uniform(-4, -0.5)),
        scheduler=scheduler,
        warmup_steps=int(generator.integers(0, 40)),
        weight_decay=float(10 ** generator.uniform(-5, -1)),
        num_cycles=int(generator.integers(1, 5)) if scheduler == "cosine_with_restarts" else None,
        seed=trial,
    ).to_dict()


def _started(trial: int, config: dict[str, Any], origin: str, clock: float) -> dict[str, Any]:
    return {
        "event": "trial_started",
        "time": clock,
        "trial": trial,
        "origin": origin,
        "config": config,
    }


def _ended(trial: int, status: str, reason: str, clock: float) -> dict[str, Any]:
    return {
        "event": "trial_ended",
        "time": clock,
        "trial": trial,
        "status": status,
        "reason": reason,
    }


def _report(
    trial: int,
    step: int,
    loss: float,
    metric: str,
    figure: float,
    config: dict[str, Any],
    clock: float,
) -> dict[str, Any]:
    return {
        "event": "report",
        "time": clock,
        "trial": trial,
        "step": step,
        "train_loss": loss - 0.05,
        "eval_loss": loss,
        "objective": loss if math.isfinite(loss) else 10.0,
        "learning_rate": config["lr"] * max(0.0, 1 - step / 100),
        metric: figure,
        "tokens": step * 8 * 56,
        "seconds": step * 0.035,
    }
