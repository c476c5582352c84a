"""Arm E: Ray Tune as its documentation shows it, each trial with a model of its own.

On the swarm each trial opens Petals' own client; without one it loads the model.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict
from typing import Any

from benchmarks.workload import Workload


def run(workload: Workload, at_once: int, *, reuse_actors: bool) -> dict[str, Any]:
    """Timed: `Tuner.fit()`, with Ray started and the data loaded and tokenised once."""
    import ray
    from ray import tune

    data = workload.data()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    cpus = os.cpu_count() or 1
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="ERROR",
    )
    trials = [
        {"number": number, **asdict(config)}
        for number, config in enumerate(workload.trial_configs())
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainable = tune.with_parameters(train, workload=workload, data=data)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus / at_once}),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                max_concurrent_trials=at_once,
                reuse_actors=reuse_actors,
            ),
            run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0),
        )
        began = time.monotonic()
        results = tuner.fit()
        seconds = time.monotonic() - began
    if results.errors:
        raise RuntimeError(
            f"{len(results.errors)} trials failed, the first one: {results.errors[0]}"
        )
    losses = {result.config["trial"]["number"]: result.metrics["eval_loss"] for result in results}
    ray.shutdown()
    return {"seconds": seconds, "losses": [losses[number] for number in range(len(trials))]}


def train(config: dict[str, Any], workload: Workload, data: Any) -> None:
    """One trial, in a process of its own."""
    import torch
    from ray import tune
    from transformers import get_scheduler

    from tune_app.run.trial_report import evaluation_steps
    from tune_app.tasks.data import DataOrder

    trial = config["trial"]
    model = _petals_model(workload, data) if workload.peers else _local_model(workload, data)
    _start_as_tune_app(model, trial)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial["lr"], weight_decay=trial["weight_decay"])
    scheduler = get_scheduler(
        trial["scheduler"], optimizer, min(trial["warmup_steps"], trial["steps"]), trial["steps"]
    )
    order = DataOrder(len(data.train), trial["batch_size"], trial["seed"])
    valid = data.valid.batch(range(len(data.valid)))
    for step in range(trial["steps"]):
        batch = data.train.batch(order.indices(step))
        loss = model(input_ids=batch.tokens_BT, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 in evaluation_steps(trial["steps"]):
            with torch.no_grad():
                eval_loss = model(input_ids=valid.tokens_BT, labels=valid.labels).loss.item()
            tune.report({"step": step + 1, "train_loss": loss.item(), "eval_loss": eval_loss})
    if workload.peers:  # or a reused actor would collect clients
        model.close()


def _petals_model(workload: Workload, data: Any) -> Any:
    """The classes for a loop of one's own; Petals' own ones need the transformers of 2023."""
    from tune_app.models import (
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from tune_app.serve.checks import dht_prefix_of

    options = {
        "initial_peers": list(workload.peers),
        "dht_prefix": dht_prefix_of(workload.model),
        "tuning_mode": "ptune",
        "pre_seq_len": workload.prompt_tokens,
    }
    if workload.task == "causal-lm":
        return AutoDistributedModelForCausalLM.from_pretrained(str(workload.model), **options)
    return AutoDistributedModelForSequenceClassification.from_pretrained(
        str(workload.model), num_labels=len(data.class_names), **options
    )


def _local_model(workload: Workload, data: Any) -> Any:
    """Prompt tuning around Hugging Face's model, with the parameter names of Petals' classes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    class PromptTuned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            folder = str(workload.model)
            if workload.task == "causal-lm":
                self.model = AutoModelForCausalLM.from_pretrained(folder)
            else:
                self.model = AutoModelForSequenceClassification.from_pretrained(
                    folder, num_labels=len(data.class_names)
                )
            self.model.eval().requires_grad_(False)
            if workload.task == "classification":
                self.model.score.requires_grad_(True)
            width = self.model.config.hidden_size
            self.prompt_embeddings = torch.nn.Embedding(workload.prompt_tokens, width)

        def forward(self, input_ids, labels):
            prompt = self.prompt_embeddings.weight.expand(len(input_ids), -1, -1)
            text = self.model.get_input_embeddings()(input_ids)
            if workload.task == "causal-lm":
                ignored = labels.new_full((len(labels), prompt.shape[1]), -100)
                labels = torch.cat([ignored, labels], dim=1)
            return self.model(inputs_embeds=torch.cat([prompt, text], dim=1), labels=labels)

    return PromptTuned()


def _start_as_tune_app(model: Any, trial: dict[str, Any]) -> None:
    """The prompts and the score head that tune_app draws from the trial's seed."""
    import torch

    generator = torch.Generator().manual_seed(trial["seed"])
    parameters = dict(model.named_parameters())
    for ending, std in (("prompt_embeddings.weight", 1.0), ("score.weight", 0.02)):
        for name, parameter in parameters.items():
            if name.endswith(ending) and not name.endswith("intermediate_" + ending):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
