"""`--dry-run`: the space, some of its configs and what the search will cost; starts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tune_app.models.folder import model_folder
from tune_app.report.evidence import next_look
from tune_app.report.judging import CHOOSING_SEEDS
from tune_app.report.words import count, duration, number
from tune_app.run.search_config import SearchConfig
from tune_app.search.estimate import Estimate, estimate
from tune_app.study.space import SearchSpace

if TYPE_CHECKING:
    from tune_app.tasks.data import TaskData

_SAMPLES = 5
_STOPS = {
    "none": "",
    "pbt": ", all concurrently; after each evaluation the worst quarter become clones of the best",
}


def dry_run(config: SearchConfig, space: SearchSpace) -> str:
    """What `python -m tune_app.search` would do, for the terminal."""
    model = model_folder(config.model, config.revision)
    data = _load(config, model)
    names = list(space.sampled_names)
    base = config.base_trial()
    rows = []
    for point in space.sample(_SAMPLES, config.seed):
        trial = space.trial_config(point, base)  # as it would be kept
        rows.append([number(getattr(trial, n), n) if n in point else "-" for n in names])
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in [names, *rows]]
    return "\n".join(
        [
            f"The space {space.name}:",
            "",
            space.describe(),
            "",
            f"{_SAMPLES} configs that it could suggest:",
            "",
            *table,
            "",
            "The data:",
            *(f"  {line}" for line in data.summary.in_words(data.task.metric)),
            *(f"  note: {note}" for note in data.notes),
            *_notes(config, space),
            "",
            *_cost(config),
            *_time(config, estimate(config, model, data)),
            *_place(config),
            "Nothing has been started.",
        ]
    )


def _load(config: SearchConfig, model: Path) -> TaskData:
    """The data, tokenised as the trials would have them."""
    from transformers import AutoTokenizer  # seconds, which the mistakes have not had to wait for

    from tune_app.tasks.loading import load_task_data

    return load_task_data(config, AutoTokenizer.from_pretrained(str(model)))


def _notes(config: SearchConfig, space: SearchSpace) -> list[str]:
    longest = space.longest_warmup()
    if longest <= config.steps:
        return []
    return [
        f"note: the space's warmup_steps go up to {longest}, but a trial has only {config.steps} "
        f"steps; larger values become {config.steps}"
    ]


def _cost(config: SearchConfig) -> list[str]:
    row_tokens = config.prompt_length + config.max_length
    trial_tokens = config.steps * config.batch_size * row_tokens
    least, most = _confirmation_runs(config)
    lines = [
        f"The search: {config.trials} trials of at most {config.steps} steps of "
        f"{config.batch_size} rows, {row_tokens} tokens each at most:",
        f"  at most {count(config.trials * trial_tokens)} tokens for training"
        + _STOPS.get(config.scheduler, f"; {config.scheduler} stops bad trials earlier"),
    ]
    if config.confirm:
        runs = f"{least}" if least == most else f"{least} to {most}"
        lines.append(
            f"  plus {runs} confirmation runs with fresh seeds, of the best {config.confirm} and "
            f"the default: at most {count(most * trial_tokens)}"
        )
    if config.time_budget is not None:
        lines.append(f"  it ends after {duration(config.time_budget)} in any case")
    if config.token_budget is not None:
        lines.append(f"  it ends after {count(config.token_budget)} tokens in any case")
    return lines


def _confirmation_runs(config: SearchConfig) -> tuple[int, int]:
    """At least and at most."""
    if not config.confirm:
        return 0, 0
    choosing = CHOOSING_SEEDS * config.confirm if config.confirm > 1 else 0
    least = next_look(0, config.confirm_seeds)
    return choosing + 2 * least, choosing + 2 * config.confirm_seeds


def _time(config: SearchConfig, found: Estimate | None) -> list[str]:
    if found is None:
        why = "is served by --peers" if config.peers else "is too large to be loaded for this"
        return [f"  time and memory: not measured, because the model {why}"]
    least, most = (
        duration(config.trials * found.trial_s + runs * found.run_s)
        for runs in _confirmation_runs(config)
    )
    lines = [
        f"  about {least if least == most else f'{least} to {most}'} if no trial is stopped early: "
        f"measured on {found.device}, in process, for {found.at_once} concurrent trials; start-up "
        "takes about 20 s more",
        f"  about {found.memory / 2**30:.1f} GB of memory for the process with the model",
    ]
    if config.backbone == "swarm":
        lines.append(
            "  a private swarm takes longer, two to three times as long with a model as small as "
            "demo, and as much memory again for its server"
        )
    return lines


def _place(config: SearchConfig) -> list[str]:
    out = config.resume or config.out or Path("runs", "<date>-<time>")
    return [f"Results would be written to {out} (it is writable)."]
