"""A function trainable for your own `tune.Tuner`, with the hosts and packs of a search.

The trials of one trainable on one node share a host: a detached actor that ends on its own when it
has been idle for a while, or with Ray.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_app.models.folder import model_folder
from tune_app.run.search_config import ConfigError, SearchConfig, TrialConfig
from tune_app.run.trial_report import Update
from tune_app.search.host import TrialHost
from tune_app.search.trial_job import TrialJob
from tune_app.serve.connection import connection_to

_NAMESPACE = "tune_app-trainables"
_IDLE_S = 60.0  # after which an idle host ends
_LOOK_S = 1.0
_ANSWER_S = 300.0  # a host that has to load its model first takes long to answer
_MOST_CALLS = 1000


class SharedHost(TrialHost):
    """The host of a trainable's trials on one node; writes data given as tables to its own
    folder."""

    def __init__(
        self, name: str, config: SearchConfig, tables: Mapping[str, bytes], threads: int
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="tune_app-host-")
        for split, content in tables.items():
            file = Path(self._folder) / f"{split}.parquet"
            file.write_bytes(content)
            config = replace(config, **{split: str(file)})  # type: ignore[arg-type]
        model = model_folder(config.model, config.revision)
        super().__init__(name, config, str(model), threads)
        self._connection = connection_to(config, model, None)
        self.connect(self._connection)
        threading.Thread(target=self._end_when_idle, name="idle", daemon=True).start()

    async def begin(self, job: TrialJob) -> None:
        await self.start(job, self._connection)

    def _end_when_idle(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < _IDLE_S:
            time.sleep(_LOOK_S)
            if self.load():
                idle_since = time.monotonic()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.close()
        os._exit(0)


def trainable_on_hosts(
    config: SearchConfig, tables: Mapping[str, bytes]
) -> Callable[[dict[str, Any]], None]:
    """The trainable; `config` is checked already, `tables` are parquet by split."""
    parts = (config, sorted(tables.items()))
    name = f"host-{hashlib.sha256(pickle.dumps(parts)).hexdigest()[:12]}"

    def train_prompts(sampled: dict[str, Any]) -> None:
        trial = TrialConfig.from_dict(sampled, config.base_trial())
        if mistakes := trial.check():
            raise ConfigError(mistakes)
        with tempfile.TemporaryDirectory(prefix="tune_app-trial-") as folder:
            _train(trial, _host(name, config, tables), Path(folder))

    return train_prompts


def _host(name: str, config: SearchConfig, tables: Mapping[str, bytes]) -> Any:
    """This node's host, created if there is none yet."""
    node = ray.get_runtime_context().get_node_id()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = config.backbone == "local" and gpus > 0 and (config.device or "cuda") != "cpu"
    actor = ray.remote(SharedHost).options(
        name=f"{name}-{node[:8]}",
        namespace=_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        num_gpus=1 if use_gpu else 0,
        max_concurrency=_MOST_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return actor.remote(name, config, tables, os.cpu_count() or 1)


def _train(trial: TrialConfig, host: Any, folder: Path) -> None:
    """Trains on the host, and reports each evaluation to Tune with a checkpoint."""
    number = int.from_bytes(os.urandom(6), "big")
    job = TrialJob(number, trial, checkpoint=folder / "checkpoint")
    before = tune.get_checkpoint()
    if before is not None:
        before.to_directory(str(job.checkpoint))
    repeats = before is not None  # a resumed run first repeats its last report
    try:
        ray.get(host.begin.remote(job), timeout=_ANSWER_S)
        while True:
            update: Update = ray.get(host.next_update.remote(number), timeout=_ANSWER_S)
            if update.error is not None:
                raise RuntimeError(update.error)
            if update.report is None:
                if update.done:
                    return
                continue
            if not repeats:
                kept = folder / f"step-{update.report.step}"
                shutil.copytree(job.checkpoint, kept)
                values = {k: v for k, v in update.report.flat().items() if v is not None}
                tune.report(values, checkpoint=tune.Checkpoint.from_directory(str(kept)))
            repeats = False
            if update.report.diverged or update.report.step >= trial.steps:
                return
    finally:
        host.stop.remote(number)
