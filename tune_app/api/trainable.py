"""Prompt tuning as a trainable for your own Ray Tune script: `make_trainable`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tune_app.api.given import config_of, data_files, named_as_arguments
from tune_app.run.search_config import ConfigError
from tune_app.search.checks import check_everything


def make_trainable(
    *, train: Any = None, valid: Any = None, test: Any = None, **settings: Any
) -> Callable[[dict[str, Any]], None]:
    """A function for `tune.Tuner(trainable, param_space={"lr": tune.loguniform(1e-4, 1e-1)})`.

    The keys of `param_space` are fields of TrialConfig: lr, scheduler, warmup_steps, ... The others
    are those of the documented default. A trial trains the prompts with AdamW over the parameters
    that require a gradient and transformers' get_scheduler. After each evaluation it reports
    `eval_loss`, the task's metric, `step`, `objective` (the loss, or a finite penalty if the trial
    diverges; what a search algorithm should minimise) and more, with a checkpoint from which it can
    resume. Trials on one node share a process, which has the model and packs their rows.

    data and settings: as for `run_search`, except those that only concern the search. Give `peers`
        to use a swarm; without them, the model runs in the process that the trials share.
    Raises ConfigError with all mistakes.
    """
    with named_as_arguments(), tempfile.TemporaryDirectory(prefix="tune_app-") as staged:
        files = data_files({"train": train, "valid": valid, "test": test}, Path(staged))
        local = {} if settings.get("peers") else {"backbone": "local"}
        config = config_of({**local, **settings, **files})
        if config.backbone == "swarm" and not config.peers:
            raise ConfigError("--backbone: swarm needs the --peers of a running swarm.")
        check_everything(config)
        tables = {
            split: Path(file).read_bytes()
            for split, file in files.items()
            if file.startswith(f"{staged}/")
        }
        from tune_app.search.ray_tune.own_tuner import trainable_on_hosts

        given = dict.fromkeys(tables)
        return trainable_on_hosts(replace(config, **given), tables)  # type: ignore[arg-type]
