"""From the configuration to tokenised splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.tasks.base import Scale, Task
from tune_app.tasks.data import Dataset, TaskData
from tune_app.tasks.known import check_task, task_named
from tune_app.tasks.readers import Texts, class_order, read_texts
from tune_app.tasks.start_tokens import start_tokens
from tune_app.tasks.stdlib_text import SPLITS
from tune_app.tasks.summary import summarise


@dataclass
class _Rows:
    """One split: token ids by row, and the class name or number of each where it has one."""

    tokens: list[tuple[int, ...]]
    labels: list[Any] | None

    def keep(self, indices: Iterable[int]) -> _Rows:
        indices = list(indices)
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return _Rows([self.tokens[i] for i in indices], labels)


def load_task_data(config: SearchConfig, tokenizer: Any) -> TaskData:
    """Reads, checks, tokenises and splits what `config` names, or the built-in text of its task.

    A row is one text, cut to `max_length` tokens; a plain-text file is one stream of tokens, cut
    into rows of `max_length`. Splits that are not given are taken from the training rows: a tenth
    each, chosen by the rows' own hashes, so neither the seed nor their order changes them.
    Raises ConfigError with everything that is wrong with the data.
    """
    notes: list[str] = []
    texts = _built_in(config) if config.train is None else read_and_check(config)
    splits = {
        split: _tokenise(split, part, config, tokenizer, notes) for split, part in texts.items()
    }
    tenth = max(1, len(set(splits["train"].tokens)) // 10)
    for split in ("valid", "test"):
        if split not in splits:
            splits["train"], splits[split] = _split_off(splits["train"], tenth)
            notes.append(
                f"no --{split} given: {len(splits[split].tokens)} training rows are taken for it"
            )
        elif config.train is None:
            splits[split] = splits[split].keep(_new_rows(split, splits))
        elif repeated := len(splits[split].tokens) - len(_new_rows(split, splits)):
            notes.append(f"{repeated} {split} rows are in {' or '.join(_before(split))} too")
    empty = [split for split in SPLITS if not splits[split].tokens]
    if empty:
        raise ConfigError(
            [f"no rows are left for {', '.join(empty)}: at least 3 different texts are needed"]
        )
    task = task_named(config.task)
    class_names, scale = _labels(task, splits, texts)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    train, valid, test = (_dataset(splits[split], class_names, scale, pad_id) for split in SPLITS)
    prints = [train.fingerprint(), valid.fingerprint(), test.fingerprint(), *class_names]
    fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()
    summary = summarise(
        task, dict(zip(SPLITS, (train, valid, test), strict=True)), class_names, scale
    )
    start = start_tokens(splits["train"].tokens, class_names, config.init_text, tokenizer)
    return TaskData(task, train, valid, test, class_names, notes, fingerprint, summary, start)


def _labels(
    task: Task, splits: dict[str, _Rows], texts: dict[str, Texts]
) -> tuple[tuple[str, ...], Scale | None]:
    """(class names by index, scale of numbers), each where the task has it."""
    if task.labels == "numbers":
        numbers = np.array(splits["train"].labels)
        return (), Scale(float(numbers.mean()), float(numbers.std()) or 1.0)
    names = {str(label) for part in texts.values() for label in part.labels or []}
    return class_order(names), None


def _built_in(config: SearchConfig) -> dict[str, Texts]:
    given = [f"--{split}" for split in ("valid", "test") if getattr(config, split) is not None]
    if given:
        raise ConfigError([f"{' and '.join(given)} without --train: give --train too"])
    task = task_named(config.task)
    if task.built_in is None:
        raise ConfigError(check_task(config))
    return {split: Texts(*rows) for split, rows in task.built_in().items()}


def read_and_check(config: SearchConfig) -> dict[str, Texts]:
    """The texts of the user's files by split. Raises ConfigError with all that is wrong."""
    texts, mistakes = {}, []
    for split in SPLITS:
        path = getattr(config, split)
        if path is None:
            continue
        try:
            texts[split] = read_texts(
                path,
                labels=task_named(config.task).labels,
                text_column=config.text_column,
                label_column=config.label_column,
            )
        except ConfigError as error:
            mistakes += error.messages
    if mistakes:
        raise ConfigError(mistakes)
    _check_labels(config, texts)
    return texts


def _check_labels(config: SearchConfig, texts: dict[str, Texts]) -> None:
    known = {*map(str, texts["train"].labels or [])}
    if not known:
        return
    mistakes, numbers = [], task_named(config.task).labels == "numbers"
    if len(known) == 1:
        needed = "different labels" if numbers else "classes"
        mistakes.append(f"{config.train}: needs at least two {needed}, got {min(known)!r} only")
    if numbers and mistakes:
        raise ConfigError(mistakes)
    if numbers:
        return
    for split in ("valid", "test"):
        strange = (
            class_order({*map(str, texts[split].labels or [])} - known) if split in texts else ()
        )
        if strange:
            mistakes.append(
                f"{getattr(config, split)}: labels that {config.train} lacks: "
                f"{', '.join(map(repr, strange[:20]))}; it has "
                f"{', '.join(map(repr, class_order(known)[:20]))}"
            )
    if mistakes:
        raise ConfigError(mistakes)


def _tokenise(
    split: str, part: Texts, config: SearchConfig, tokenizer: Any, notes: list[str]
) -> _Rows:
    notes += part.notes
    limit = config.max_length
    # verbose: no warning about the model's longest input, since rows are cut right here
    ids = tokenizer(part.texts, add_special_tokens=True, verbose=False)["input_ids"]
    if part.is_stream:
        stream = ids[0]
        tokens = [tuple(stream[i : i + limit]) for i in range(0, len(stream), limit)]
    else:
        tokens = [tuple(row[:limit]) for row in ids]
        longer = sum(len(row) > limit for row in ids)
        if longer:
            notes.append(
                f"{longer} of {len(ids)} {split} texts are longer than --max-length {limit} "
                "and were cut"
            )
    # a language model learns from a row's second token on
    least = 2 if task_named(config.task).unit == "token" else 1
    kept = [i for i, row in enumerate(tokens) if len(row) >= least]
    if len(kept) < len(tokens) and not part.is_stream:
        notes.append(
            f"{len(tokens) - len(kept)} {split} texts of fewer than {least} tokens were dropped"
        )
    return _Rows(tokens, part.labels).keep(kept)


def _before(split: str) -> tuple[str, ...]:
    return SPLITS[: SPLITS.index(split)]


def _new_rows(split: str, splits: dict[str, _Rows]) -> list[int]:
    """Rows that no split before this one has (different texts may be equal once they are cut)."""
    seen = {row for earlier in _before(split) for row in splits[earlier].tokens}
    return [i for i, row in enumerate(splits[split].tokens) if row not in seen]


def _split_off(rows: _Rows, count: int) -> tuple[_Rows, _Rows]:
    """(the rest, `count` different rows with all their repetitions)."""
    ranked = sorted(set(rows.tokens), key=lambda row: hashlib.sha256(repr(row).encode()).digest())
    taken = set(ranked[:count])
    inside = [row in taken for row in rows.tokens]
    return (
        rows.keep(i for i, is_in in enumerate(inside) if not is_in),
        rows.keep(i for i, is_in in enumerate(inside) if is_in),
    )


def _dataset(
    rows: _Rows, class_names: tuple[str, ...], scale: Scale | None, pad_id: int
) -> Dataset:
    labels: list[Any] | None = rows.labels
    if labels is not None and scale is not None:
        labels = [(number - scale.mean) / scale.std for number in labels]
    elif labels is not None:
        index = {name: i for i, name in enumerate(class_names)}
        labels = [index[label] for label in labels]
    return Dataset(rows.tokens, labels, pad_id)
