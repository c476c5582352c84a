"""`--dry-run`: the space, some of its configs and what the search will cost; starts nothing."""

from __future__ import annotations

from tune_app.models.folder import model_folder
from tune_app.report.confirmation import CHOOSING_SEEDS
from tune_app.report.evidence import next_look
from tune_app.report.words import count, duration, number
from tune_app.run.search_config import SearchConfig
from tune_app.study.space import SearchSpace

_SAMPLES = 5
_STOPS = {
    "none": "",
    "pbt": ", all at once; after each evaluation the worst quarter goes on from the best",
}


def dry_run(config: SearchConfig, space: SearchSpace) -> str:
    """What `python -m tune_app.search` would do, for the terminal."""
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
            *_data(config),
            *_notes(config, space),
            "",
            *_cost(config),
        ]
    )


def _data(config: SearchConfig) -> list[str]:
    """All that is known of the data, tokenised as the trials would have them."""
    from transformers import AutoTokenizer  # seconds, which the mistakes have not had to wait for

    from tune_app.tasks.loading import load_task_data

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder(config.model, config.revision)))
    data = load_task_data(config, tokenizer)
    lines = ["The data:", *(f"  {line}" for line in data.summary.in_words(data.task.metric))]
    return lines + [f"  note: {note}" for note in data.notes]


def _notes(config: SearchConfig, space: SearchSpace) -> list[str]:
    longest = space.longest_warmup()
    if longest <= config.steps:
        return []
    return [
        f"note: warmup_steps goes up to {longest}, and a trial has {config.steps} steps: a longer "
        f"warmup is one of {config.steps} steps, and the config says so"
    ]


def _cost(config: SearchConfig) -> list[str]:
    row_tokens = config.prompt_length + config.max_length
    trial_tokens = config.steps * config.batch_size * row_tokens
    choosing = CHOOSING_SEEDS * config.confirm if config.confirm > 1 else 0
    least, most = (
        choosing + 2 * seeds for seeds in (next_look(0, config.confirm_seeds), config.confirm_seeds)
    )
    lines = [
        f"The search: {config.trials} trials of at most {config.steps} steps of "
        f"{config.batch_size} rows, {row_tokens} tokens each at most:",
        f"  at most {count(config.trials * trial_tokens)} tokens for training"
        + _STOPS.get(config.scheduler, f"; {config.scheduler} stops bad trials earlier"),
    ]
    if config.confirm:
        runs = f"{least}" if least == most else f"{least} to {most}"
        lines.append(
            f"  and {runs} runs that confirm the best {config.confirm} against the default with "
            f"fresh seeds: at most {count(most * trial_tokens)}"
        )
    if config.time_budget is not None:
        lines.append(f"  it ends after {duration(config.time_budget)} in any case")
    if config.token_budget is not None:
        lines.append(f"  it ends after {count(config.token_budget)} tokens in any case")
    return [*lines, "Nothing has been started."]
