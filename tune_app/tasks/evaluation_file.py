"""A file of its own, to evaluate finished prompts on: no splits, and the classes are given."""

from __future__ import annotations

from typing import Any

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.base import Scale
from tune_app.tasks.data import Dataset
from tune_app.tasks.known import task_named
from tune_app.tasks.loading import _dataset, _tokenise
from tune_app.tasks.readers import class_order, read_texts


def load_evaluation_file(
    path: str,
    config: SearchConfig,
    tokenizer: Any,
    class_names: tuple[str, ...],
    scale: Scale | None = None,
) -> tuple[Dataset, list[str]]:
    """All rows of the file, tokenised as in training, and notes for the user.

    Columns and length are the config's, classes or scale those of training. Raises ConfigError
    where the file cannot be read or has labels that are none of `class_names`.
    """
    texts = read_texts(
        path,
        labels=task_named(config.task).labels,
        text_column=config.text_column,
        label_column=config.label_column,
    )
    strange = class_order({*map(str, texts.labels or [])} - {*class_names}) if class_names else ()
    if strange:
        raise ConfigError(
            f"{path}: labels that the prompts do not know: {', '.join(map(repr, strange[:20]))}; "
            f"they know {', '.join(map(repr, class_names[:20]))}"
        )
    notes: list[str] = []
    rows = _tokenise("evaluation", texts, config, tokenizer, notes)
    if not rows.tokens:
        raise ConfigError(f"{path}: no text in it is long enough to be judged")
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return _dataset(rows, class_names, scale, pad_id), notes
