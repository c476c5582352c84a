"""The tasks that --task takes, by name. A new one needs a file in this folder and a line here."""

from __future__ import annotations

from typing import get_args

from tune_app.run.search_config import ConfigError, SearchConfig, one_of
from tune_app.run.trial_config import Init
from tune_app.tasks.base import Task
from tune_app.tasks.causal_lm import CAUSAL_LM
from tune_app.tasks.classification import CLASSIFICATION
from tune_app.tasks.objectives import OBJECTIVES
from tune_app.tasks.regression import REGRESSION

TASKS = {task.name: task for task in (CLASSIFICATION, CAUSAL_LM, REGRESSION)}


def task_named(name: str) -> Task:
    """The task of that name. Raises ConfigError if there is none."""
    if name not in TASKS:
        raise ConfigError(f"--task: {one_of(name, TASKS)}")
    return TASKS[name]


def check_task(config: SearchConfig, *, needs_data: bool = True) -> list[str]:
    """What is wrong with the task and with settings that only some tasks have; messages name flags.

    needs_data: whether the search's data will be read
    """
    if config.task not in TASKS:
        return [f"--task: {one_of(config.task, TASKS)}"]
    task, messages = TASKS[config.task], []
    if needs_data and config.train is None and task.built_in is None:
        messages.append(f"--train: needed, because --task {task.name} has no built-in data.")
    for name in ("prompt_column", "completion_column"):
        if getattr(config, name) is not None and task.labels != "none":
            flag = "--" + name.replace("_", "-")
            messages.append(f"{flag}: only with --task causal-lm, which learns completions.")
    if (config.prompt_column is None) != (config.completion_column is None):
        messages.append("--prompt-column and --completion-column: give both or neither.")
    if config.label_column is not None and task.labels == "none":
        messages.append(f"--label-column: not with --task {task.name}, which has no labels.")
    if config.objective not in OBJECTIVES:
        messages.append(f"--objective: {one_of(config.objective, OBJECTIVES)}")
    elif config.objective not in task.objectives:
        messages.append(
            f"--objective: --task {task.name} can optimise {' or '.join(task.objectives)}, "
            f"got {config.objective!r}."
        )
    init = str((config.trial or {}).get("init"))
    if init in get_args(Init) and (message := check_init(config, init)):
        messages.append(f"trial: {message}")
    return messages


def check_init(config: SearchConfig, init: str) -> str | None:
    """Why the search cannot use that TrialConfig.init; None if it can."""
    task = TASKS.get(config.task)
    labels = ("labels",) if task is not None and task.labels == "classes" else ()
    possible = ("normal", "vocab", *labels, *(("text",) if config.init_text else ()))
    if init in possible:
        return None
    reason = {
        "text": "needs --init-text, the words to start from",
        "labels": f"needs class names, and --task {config.task} has none",
    }
    return f"init: {init!r} {reason[init]}; possible here are {', '.join(possible)}."
