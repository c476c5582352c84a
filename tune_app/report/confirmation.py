"""Is the best config better than the documented default, or was its seed lucky?

After a search the best configs and the default are trained again with fresh seeds. The winner is
the one with the lowest mean validation loss, and it is judged on the test split: the lowest of
several test losses would be partly luck. Runs with the same seed see the same data in the same
order from the same prompt initialisation, so they are compared in pairs, which takes most of the
seed's noise out.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from tune_app.run.run_dir import Status

COLUMNS = [
    "trial",  # the trial of the search that was repeated; 0 is the documented default
    "seeds",  # finished runs
    "failed",  # runs that diverged, failed or were interrupted
    "split",  # "test", or "validation" where the runs have no test loss
    "valid",  # mean validation loss over the seeds, which ranks the configs
    "mean",  # of the loss on `split` over the seeds
    "spread",  # standard deviation over the seeds (n - 1); NaN for one seed
    "metric",  # mean of the task's metric
    "metric_spread",
    "difference",  # mean over the shared seeds of (this trial's loss - the default's)
    "low",  # 95 % interval of the difference, Student's t; NaN for fewer than two pairs
    "high",
    "pairs",
]


def confirmation(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row for each confirmed trial, the lowest validation loss first; columns as in COLUMNS.

    Trials with fewer finished seeds stand behind the others: a config that diverges with another
    seed must not win with the seeds that went well.
    """
    runs = trials[(trials["origin"] == "confirm") & trials["of"].notna()]
    tested = "test_loss" in runs and runs["test_loss"].notna().any()
    if runs.empty or "seed" not in runs:
        return pd.DataFrame(columns=COLUMNS)
    loss = "test_loss" if tested else "eval_loss"
    figure = f"test_{metric}" if tested else metric
    good = runs[(runs["status"] == Status.FINISHED) & runs[loss].notna()]
    by_seed = {
        int(of): dict(zip(group["seed"], group[loss], strict=True))
        for of, group in good.groupby("of")
    }
    default = by_seed.get(0, {})
    rows = []
    for of, group in runs.groupby("of"):
        losses = by_seed.get(int(of), {})
        finished = good[good["of"] == of]
        metrics = finished[figure] if figure in finished else pd.Series(dtype=float)
        shared = [seed for seed in losses if seed in default and int(of) != 0]
        mean, low, high = _interval(np.array([losses[seed] - default[seed] for seed in shared]))
        rows.append(
            {
                "trial": int(of),
                "seeds": len(losses),
                "failed": int((~group["status"].isin([Status.FINISHED, Status.RUNNING])).sum()),
                "split": "test" if tested else "validation",
                "valid": float(finished["eval_loss"].mean()),
                "mean": float(np.mean(list(losses.values()))) if losses else math.nan,
                "spread": float(np.std(list(losses.values()), ddof=1))
                if len(losses) > 1
                else math.nan,
                "metric": float(metrics.mean()) if len(metrics) else math.nan,
                "metric_spread": float(metrics.std()) if len(metrics) > 1 else math.nan,
                "difference": mean,
                "low": low,
                "high": high,
                "pairs": len(shared),
            }
        )
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sort_values(
        ["seeds", "valid"], ascending=[False, True], kind="stable", ignore_index=True
    )


def _interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences, shape [pairs]; NaN where there are too few."""
    pairs = len(differences)
    if pairs == 0:
        return math.nan, math.nan, math.nan
    mean = float(differences.mean())
    if pairs == 1:
        return mean, math.nan, math.nan
    half = float(stdtrit(pairs - 1, 0.975) * differences.std(ddof=1) / math.sqrt(pairs))
    return mean, mean - half, mean + half
