"""From the configuration to tokenised splits."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np

from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.trial_report import rows_of_a_glimpse
from tune_app.tasks.base import Scale, Task
from tune_app.tasks.data import Dataset, TaskData
from tune_app.tasks.known import check_task, task_named
from tune_app.tasks.readers import Reading, Texts, class_order, read_texts
from tune_app.tasks.splits import Rows, begin_with_sample, sample, split_off
from tune_app.tasks.start_tokens import start_tokens
from tune_app.tasks.stdlib_text import SPLITS
from tune_app.tasks.summary import summarise
from tune_app.tasks.tokens import Lengths, tokenise


def load_task_data(config: SearchConfig, tokenizer: Any) -> TaskData:
    """Reads, checks, tokenises and splits the config's files, or the built-in text of its task.

    A row is one text, cut to `max_length` tokens; a plain-text file is one stream of tokens, cut
    into rows of `max_length`. Missing splits are taken from the training rows, a tenth each, and
    trials are compared on a sample of the validation rows: see `splits.py`. Raises ConfigError with
    all that is wrong with the data.
    """
    task, notes = task_named(config.task), list[str]()
    texts = _built_in(config, task) if config.train is None else read_and_check(config)
    splits, lengths = {}, Lengths(config.max_length)
    for split, part in texts.items():
        notes += part.notes
        splits[split] = tokenise(part, task, config.max_length, tokenizer, lengths.of(split))
    notes += lengths.notes()
    _split(config, task, splits, notes)
    _check_splits(config, task, splits)
    class_names, scale = _labels(task, splits, texts)
    notes += _notes_on_labels(task, splits, class_names)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    judged = sample(splits["valid"], config.eval_rows, task.labels)
    glimpse = rows_of_a_glimpse(len(judged.tokens))
    judged = begin_with_sample(judged, glimpse, task.labels)
    datasets = {
        split: dataset(rows, class_names, scale, pad_id)
        for split, rows in (*splits.items(), ("judged", judged))
    }
    if len(judged.tokens) < len(splits["valid"].tokens):
        notes.append(
            f"trials are compared on {len(judged.tokens)} of {len(splits['valid'].tokens)} valid "
            "rows" + (", stratified by class" if class_names else "") + " (--eval-rows)"
        )
    if config.train is not None and config.model == "demo":
        notes.append("the demo model is only for trying things out; for real results give --model")
    train, valid, test = (datasets[split] for split in SPLITS)
    prints = [train.fingerprint(), valid.fingerprint(), test.fingerprint(), *class_names]
    fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()
    columns = {split: part.columns for split, part in texts.items() if part.columns}
    summary = summarise(task, datasets, class_names, scale, columns)
    start = start_tokens(splits["train"].tokens, class_names, config.init_text, tokenizer)
    return TaskData(
        task=task,
        train=train,
        valid=valid,
        judged=datasets["judged"],
        test=test,
        class_names=class_names,
        notes=notes,
        fingerprint=fingerprint,
        summary=summary,
        start=start,
        glimpse=glimpse,
    )


def _built_in(config: SearchConfig, task: Task) -> dict[str, Texts]:
    given = [f"--{split}" for split in ("valid", "test") if getattr(config, split) is not None]
    if given:
        raise ConfigError([f"{' and '.join(given)}: needs --train as well"])
    if task.built_in is None:
        raise ConfigError(check_task(config))
    return {split: Texts(*rows) for split, rows in task.built_in().items()}


def read_and_check(config: SearchConfig) -> dict[str, Texts]:
    """The texts of the user's files by split. Raises ConfigError with all that is wrong."""
    reading = Reading.of(config, task_named(config.task).labels)
    texts, mistakes = {}, list[str]()
    for split in SPLITS:
        path = getattr(config, split)
        if path is None:
            continue
        try:
            texts[split] = read_texts(path, reading)
        except ConfigError as error:
            mistakes += error.messages
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))
    _check_labels(config, texts)
    return texts


def _check_labels(config: SearchConfig, texts: dict[str, Texts]) -> None:
    if texts["train"].labels is None:
        return
    numbers = task_named(config.task).labels == "numbers"
    known, mistakes = set(map(str, texts["train"].labels)), list[str]()
    if len(known) == 1:
        needed = "different numbers" if numbers else "classes"
        mistakes.append(f"{config.train}: needs at least two {needed}, got only {min(known)!r}")
    for split in ("valid", "test"):
        if numbers or split not in texts:
            continue
        strange = class_order(set(map(str, texts[split].labels or [])) - known)
        if strange:
            mistakes.append(
                f"{getattr(config, split)}: has labels that are not in {config.train}: "
                f"{', '.join(map(repr, strange[:20]))}; that file has "
                f"{', '.join(map(repr, class_order(known)[:20]))}"
            )
    if mistakes:
        raise ConfigError(mistakes)


def _split(config: SearchConfig, task: Task, splits: dict[str, Rows], notes: list[str]) -> None:
    """Takes missing splits from the training rows, and removes rows of earlier splits from the
    built-in ones."""
    tenth = max(1, len(set(splits["train"].tokens)) // 10)
    missing = [split for split in ("valid", "test") if split not in splits]
    for split in ("valid", "test"):
        if split in missing:
            later = len(missing) - missing.index(split) - 1
            splits["train"], splits[split] = split_off(
                splits["train"], tenth, task.labels, later=later
            )
            notes.append(
                f"no --{split} given: using {len(splits[split].tokens)} of the training rows for it"
            )
            continue
        new = _new_rows(split, splits)
        if repeated := len(splits[split].tokens) - len(new):
            rows = f"{repeated} {split} row{'s' * (repeated > 1)}"
            note = f"{rows} {'are' if repeated > 1 else 'is'} also in {' or '.join(_before(split))}"
            if config.train is None:
                splits[split] = splits[split].keep(new)
                note += " and left out"
            notes.append(note)


def _check_splits(config: SearchConfig, task: Task, splits: dict[str, Rows]) -> None:
    empty = [split for split in SPLITS if not splits[split].tokens]
    if not empty:
        return
    of_a_class = " of one class" if task.labels == "classes" else ""
    raise ConfigError(
        f"no rows are left for {', '.join(empty)}: at least 3 different texts{of_a_class} are "
        f"needed after cutting to {config.max_length} tokens (--max-length)"
        + _too_many_classes(splits["train"])
    )


def _too_many_classes(train: Rows) -> str:
    """A remark if the labels look like numbers or like names of single rows; else ""."""
    classes, rows = set(train.labels or []), len(set(train.tokens))
    if len(classes) <= rows / 2 or len(classes) <= 2:
        return ""
    try:
        numbers = bool([float(name) for name in classes])
    except ValueError:
        numbers = False
    hint = "; to predict numbers use --task regression" if numbers else ""
    return f"; there are {len(classes)} classes for {rows} different rows of train{hint}"


def _labels(
    task: Task, splits: dict[str, Rows], texts: dict[str, Texts]
) -> tuple[tuple[str, ...], Scale | None]:
    """(class names by index, scale of numbers), each empty or None if the task does not have it."""
    if task.labels == "numbers":
        numbers = np.array(splits["train"].labels)
        return (), Scale(float(numbers.mean()), float(numbers.std()) or 1.0)
    names = {str(label) for part in texts.values() for label in part.labels or []}
    return class_order(names), None


def _notes_on_labels(
    task: Task, splits: dict[str, Rows], class_names: tuple[str, ...]
) -> list[str]:
    if not class_names:
        return []
    notes = []
    if remark := _too_many_classes(splits["train"]):
        notes.append(remark.removeprefix("; "))
    for split in SPLITS:
        lacks = [name for name in class_names if name not in set(splits[split].labels or [])]
        if lacks:
            more = f" and {len(lacks) - 5} more" if len(lacks) > 5 else ""
            classes = "class" if len(lacks) == 1 else "classes"
            notes.append(
                f"{split} has no rows of {classes} {', '.join(map(repr, lacks[:5]))}{more}"
            )
    labels_of: dict[tuple[int, ...], set[Any]] = defaultdict(set)
    for row, label in zip(splits["train"].tokens, splits["train"].labels or [], strict=True):
        labels_of[row].add(label)
    if several := sum(len(labels) > 1 for labels in labels_of.values()):
        notes.append(f"{several} train texts appear with different labels")
    return notes


def _before(split: str) -> tuple[str, ...]:
    return SPLITS[: SPLITS.index(split)]


def _new_rows(split: str, splits: dict[str, Rows]) -> list[int]:
    """Rows that are in no earlier split (different texts may be equal once they are cut)."""
    seen = {row for earlier in _before(split) for row in splits[earlier].tokens}
    return [i for i, row in enumerate(splits[split].tokens) if row not in seen]


def dataset(rows: Rows, class_names: tuple[str, ...], scale: Scale | None, pad_id: int) -> Dataset:
    """The rows as tensors: classes by index, numbers standardised."""
    labels: list[Any] | None = rows.labels
    if labels is not None and scale is not None:
        labels = [(number - scale.mean) / scale.std for number in labels]
    elif labels is not None:
        index = {name: i for i, name in enumerate(class_names)}
        labels = [index[label] for label in labels]
    return Dataset(rows.tokens, labels, pad_id, rows.learned_from)
