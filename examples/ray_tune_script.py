"""Prompt tuning in your own Ray Tune script, with any searcher and scheduler.

    python examples/ray_tune_script.py [--trials 8] [--steps 60]

Uses the demo model and the built-in text of tune_app. With your own data and model:
make_trainable(train="reviews.csv", model="~/models/Llama-3.1-8B", ...).
"""

import argparse
import tempfile

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

import tune_app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    trainable = tune_app.make_trainable(model="demo", steps=options.steps)
    ray.init("local", num_cpus=4, include_dashboard=False)  # a CPU for each trial, which only waits
    tuner = tune.Tuner(
        trainable,
        param_space={
            "lr": tune.loguniform(1e-4, 1e-1),
            "scheduler": tune.choice(["linear", "cosine", "constant_with_warmup"]),
            "warmup_steps": tune.randint(0, options.steps // 2 + 1),
        },
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="min",
            num_samples=options.trials,
            max_concurrent_trials=4,
            search_alg=OptunaSearch(seed=0),
            scheduler=ASHAScheduler(time_attr="step", max_t=options.steps + 1, grace_period=1),
        ),
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0),
    )
    results = tuner.fit()
    best = results.get_best_result()
    print(f"{len(results)} trials, {results.num_errors} failed")
    print(f"best: loss {best.metrics['eval_loss']:.3f} with {best.config}")
    print(f"checkpoint: {best.checkpoint.path}")


if __name__ == "__main__":
    main()
