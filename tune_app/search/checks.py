"""Finds all mistakes in a search's settings before anything starts, and reports them together."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from functools import partial

from optuna.distributions import CategoricalDistribution, IntDistribution

from tune_app.models.checks import check_checkpoint, was_checked
from tune_app.models.folder import model_folder, positions
from tune_app.run.config_checks import check_search_config
from tune_app.run.own_code import code_named, is_own, not_own
from tune_app.run.run_dir import RunDir
from tune_app.run.run_state import RunState
from tune_app.run.search_config import ConfigError, SearchConfig, settings_with
from tune_app.run.settings import Role
from tune_app.search.warm_start import check_warm_start
from tune_app.serve.checks import ANSWER_S, answers, check_petals
from tune_app.serve.connection import request_tokens
from tune_app.study.explore import check_population
from tune_app.study.python_space import code_recorded
from tune_app.study.space import SearchSpace
from tune_app.study.yaml_space import load_space, shipped_spaces
from tune_app.tasks.known import check_init, check_task
from tune_app.tasks.stdlib_text import SPLITS


def check_everything(config: SearchConfig, *, needs_data: bool = True) -> SearchSpace:
    """The search's space, if the whole config can be used.

    needs_data: whether the search's data will be read; to apply prompts they are not needed
    Raises ConfigError with all mistakes.
    """
    messages = check_search_config(config) + check_task(config, needs_data=needs_data)
    if config.backbone == "swarm":
        messages += check_petals()
    messages += _check_device(config)
    space = None
    try:
        space = _load_space(config).within(partial(check_init, config))
    except ConfigError as error:
        messages += error.messages
    if not any(message.startswith("--model") for message in messages):
        messages += _check_model(config, space)
    if config.peers and not any(message.startswith("--peers") for message in messages):
        messages += _check_peers(config)
    if not any(
        message.startswith(("--task", "--train", "--valid", "--test")) for message in messages
    ):
        messages += _check_data(config)
    trial_is_fine = not any(message.startswith("trial:") for message in messages)
    if config.scheduler == "pbt" and space is not None and trial_is_fine:
        messages += check_population(config, space)
    if space is not None:
        messages += check_warm_start(config, space)
    messages += _check_mlflow(config) + _check_wandb(config)
    if config.resume is not None and space is not None and not messages:
        messages += _check_resumed(config, space, RunDir(config.resume))
    if messages or space is None:
        raise ConfigError(messages)
    return space


def _check_device(config: SearchConfig) -> list[str]:
    """Whether the requested device exists; on other machines only their hosts can tell."""
    kind, _, number = (config.device or "cpu").partition(":")
    if kind not in ("cuda", "mps") or config.address is not None:
        return []
    import torch  # takes seconds, so only if such a device is requested

    if kind == "mps":
        found = int(torch.backends.mps.is_available())
    else:
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found > int(number or 0):
        return []
    there = f"this machine has {found}" if found else "this machine has none"
    return [f"--device: there is no {config.device} ({there}); leave it out, or give cpu."]


def _load_space(config: SearchConfig) -> SearchSpace:
    """The space that the config names.

    If a resumed run started with a space that comes with tune_app, the run's copy is used, because
    another version may have other ranges.
    """
    if config.resume is not None and config.space in shipped_spaces():
        run = RunDir(config.resume)
        _check_code(config, run)
        if (
            run.space_yaml.is_file()
            and SearchConfig.from_yaml(run.search_yaml).space == config.space
        ):
            return replace(load_space(str(run.space_yaml)), name=config.space)
    return load_space(config.space)


def _check_code(config: SearchConfig, run: RunDir) -> None:
    """Raises ConfigError if the run's copy of its space names other code than the config, which
    this user has not named for the run before."""
    code = code_recorded(run.space_yaml)
    if code is not None and code != code_named(config.space) and not is_own(run, code):
        raise ConfigError(not_own("--space", code))


def _check_resumed(config: SearchConfig, space: SearchSpace, run: RunDir) -> list[str]:
    """Differences from the resumed run that would make its trials incomparable."""
    if not run.search_yaml.is_file():  # the run was killed before its first trial
        return []
    before, config = SearchConfig.from_yaml(run.search_yaml).anchored(), config.anchored()
    messages = [
        f"--{name.replace('_', '-')}: must stay as the run started; it started with "
        f"{getattr(before, name)}, got {getattr(config, name)}."
        for name in settings_with(Role.SAME)
        if getattr(before, name) != getattr(config, name)
        and not (name in SPLITS and getattr(before, name) and getattr(config, name))
    ]  # data may have another name if their fingerprint is the same: see `check_same_data`
    population = _check_same_population(before, config)
    if before.objective != config.objective:
        population.append(
            f"--objective: must stay as the run started; it started with {before.objective}, got "
            f"{config.objective}. Start a new run with another --out."
        )
    try:
        _check_code(config, run)
        old_space = load_space(str(run.space_yaml)).within(partial(check_init, before))
    except ConfigError as error:
        return error.messages
    messages += [f"--space: {change}." for change in old_space.difference(space)]
    if config.allow_changed_space:
        return population + [
            f"--space: Optuna cannot use the old trials, because {name} now has other choices or "
            "another kind; start a new search."
            for name in old_space.incompatible_with(space)
        ]
    if messages:
        messages.append(
            "With another space, model or data, the trials of a run cannot be compared; start a "
            "new run with another --out, or add --allow-changed-space."
        )
    return population + messages


def _check_same_population(before: SearchConfig, config: SearchConfig) -> list[str]:
    """A population starts together and its trials change, so trials cannot be added or removed."""
    both = (before.scheduler, config.scheduler)
    if "pbt" in both and before.scheduler != config.scheduler:
        return [
            "--scheduler: cannot switch to or from pbt when resuming; this run started with "
            f"{before.scheduler}, got {config.scheduler}."
        ]
    if "pbt" in both and before.trials != config.trials:
        return [
            f"--trials: a population (pbt) keeps its size; this run started with {before.trials}, "
            f"got {config.trials}. Start a new run with another --out."
        ]
    return []


def check_same_data(config: SearchConfig, run: RunDir, fingerprint: str) -> None:
    """Raises ConfigError if a resumed run's data are not those that it started with."""
    before = RunState.read(run).first
    if before is None or config.allow_changed_space or before.fingerprint == fingerprint:
        return
    raise ConfigError(
        "--resume: the data have changed since the run started (other rows); start a new run with "
        "another --out, or add --allow-changed-space."
    )


def judged_otherwise(run: RunDir) -> bool:
    """Whether the run started with a version that compared trials on the first validation rows."""
    before = RunState.read(run).first
    return before is not None and not before.data


def _check_model(config: SearchConfig, space: SearchSpace | None) -> list[str]:
    try:
        folder = model_folder(config.model, config.revision)
    except ConfigError as error:
        return error.messages
    if not (config.quiet or was_checked(folder)):
        print("checking the model's files ...", file=sys.stderr, flush=True)
    mistakes: list[str] = []
    check_checkpoint(folder, mistakes)
    if mistakes:
        return [f"--model: {mistake}" for mistake in mistakes]
    messages, limit = [], positions(folder)
    longest = config.prompt_length if space is None else _longest_prompt(config, space)
    if limit is not None and longest + config.max_length > limit:
        messages.append(
            f"--prompt-length and --max-length: {longest} prompt and {config.max_length} text "
            f"tokens are {longest + config.max_length} positions; {config.model} has {limit}."
        )
    if config.backbone == "swarm" and longest + config.max_length > request_tokens(config):
        messages.append(
            f"--prompt-length and --max-length: {longest} prompt and {config.max_length} text "
            f"tokens are a row of {longest + config.max_length}; a request to the swarm can have "
            f"{request_tokens(config)}" + (" (see --request-tokens)." if config.peers else ".")
        )
    return messages


def _longest_prompt(config: SearchConfig, space: SearchSpace) -> int:
    distribution = space.distributions().get("prompt_length")
    if isinstance(distribution, IntDistribution):
        return distribution.high
    if isinstance(distribution, CategoricalDistribution):
        return max(int(str(choice)) for choice in distribution.choices)
    return int(space.fixed.get("prompt_length", config.prompt_length))


def _check_peers(config: SearchConfig) -> list[str]:
    """Whether any of the peers accepts connections; hivemind itself would wait for a minute."""
    if any(map(answers, config.peers)):
        return []
    return [
        f"--peers: no answer within {ANSWER_S:g} s from {', '.join(config.peers)}; is the "
        "swarm running, and the port reachable from here?"
    ]


def _check_data(config: SearchConfig) -> list[str]:
    if config.train is None:
        return []
    from tune_app.tasks.loading import read_and_check

    try:
        read_and_check(config)
    except ConfigError as error:
        return error.messages
    return []


def _check_mlflow(config: SearchConfig) -> list[str]:
    """Whether MLflow is installed and the tracking URI answers."""
    if config.mlflow is None:
        return []
    # A server that dies should not cost minutes, and no usage data should be sent.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if importlib.util.find_spec("mlflow") is None:
        return ["--mlflow: needs the package mlflow-skinny (or mlflow): pip install mlflow-skinny"]
    from mlflow import MlflowClient

    try:
        MlflowClient(config.mlflow).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, SQLAlchemy's or the transport's
        reason = str(error).strip().partition("\n")[0]
        return [f"--mlflow: no answer from {config.mlflow!r}: {reason}"]
    return []


def _check_wandb(config: SearchConfig) -> list[str]:
    """Whether wandb is installed and logged in to an account; contacts no server."""
    if config.wandb is None:
        return []
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if importlib.util.find_spec("wandb") is None:
        return ["--wandb: needs the package wandb: pip install wandb"]
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or "WANDB_API_KEY" in os.environ:
        return []
    import wandb

    if wandb.login(prompt=False):
        return []
    return [
        "--wandb: not logged in; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline "
        "and upload later with `wandb sync`."
    ]
