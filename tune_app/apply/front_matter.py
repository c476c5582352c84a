"""The YAML at the head of a model card, which a hub uses to sort, link and show the model.

The keys are those of huggingface_hub's `ModelCardData` and its `model-index`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tune_app.models.folder import is_local
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.apply.prompts_folder import About

_HUB_DATASET = re.compile(r"hf://datasets/([^/@]+/[^/@]+)")


def front_matter(about: About, title: str) -> str:
    """The block with its `---` lines."""
    name, task = about.model.name, task_named(about.task).hub_task
    train = about.search.get("train")
    dataset = _HUB_DATASET.match(train or "")
    data: dict[str, Any] = {}
    if not is_local(name):
        data = {"base_model": name, "base_model_relation": "adapter"}
    data |= {
        "library_name": "peft" if about.config.tuning_mode == "ptune" else "tune_app",
        "pipeline_tag": task,
        "tags": ["prompt-tuning", about.config.tuning_mode, "tune_app"],
    }
    if dataset is not None:
        data["datasets"] = [dataset[1]]
    if "test" in about.metrics:
        data_name = "the built-in text of the task" if train is None else Path(train).name
        metrics = [
            {"type": metric, "value": round(value, 4)}
            for metric, value in about.metrics["test"].items()
        ]
        result = {
            "task": {"type": task},
            "dataset": {
                "name": data_name,
                "type": data_name if dataset is None else dataset[1],
                "split": "test",
            },
            "metrics": metrics,
        }
        data["model-index"] = [{"name": title, "results": [result]}]
    lines = ["---"]
    if is_local(name):
        lines.append("# base_model: ORGANISATION/NAME, if the model is also on a hub")
    return "\n".join([*lines, yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"])
