"""A file or table to evaluate tuned prompts on: no splits, and the classes are given."""

from __future__ import annotations

from typing import Any

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.base import Scale
from tune_app.tasks.data import Dataset
from tune_app.tasks.files import Source, source_name
from tune_app.tasks.known import task_named
from tune_app.tasks.loading import dataset
from tune_app.tasks.readers import Reading, class_name, class_order, read_texts
from tune_app.tasks.tokens import Lengths, tokenise


def load_evaluation_file(
    source: Source,
    config: SearchConfig,
    tokenizer: Any,
    class_names: tuple[str, ...],
    scale: Scale | None = None,
) -> tuple[Dataset, list[str]]:
    """All rows of the file or table, tokenised as in training, and notes for the user.

    Columns and length are the config's, classes or scale those of training. Raises ConfigError if
    it cannot be read or has labels that are not in `class_names`.
    """
    task, name = task_named(config.task), source_name(source)
    texts = read_texts(source, Reading.of(config, task.labels))
    # Older prompts may call a class 1.0 that is now called 1.
    known = tuple(map(class_name, class_names))
    strange = class_order({*map(str, texts.labels or [])} - {*known}) if class_names else ()
    if strange:
        raise ConfigError(
            f"{name}: labels that the prompts do not know: {', '.join(map(repr, strange[:20]))}; "
            f"they know {', '.join(map(repr, class_names[:20]))}"
        )
    lengths = Lengths(config.max_length)
    rows = tokenise(texts, task, config.max_length, tokenizer, lengths.of("evaluation"))
    if not rows.tokens:
        raise ConfigError(f"{name}: no text in it is long enough to evaluate")
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return dataset(rows, known, scale, pad_id), texts.notes + lengths.notes()
