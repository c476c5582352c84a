"""Texts into rows of tokens, and how many of them were cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tune_app.tasks.base import Task
from tune_app.tasks.readers import Texts
from tune_app.tasks.splits import Rows


@dataclass
class SplitLengths:
    """Tokens of each text of a split before cutting, and how many rows were dropped."""

    tokens: list[int] = field(default_factory=list)
    dropped: int = 0


@dataclass
class Lengths:
    """What cutting to `max_length` did."""

    max_length: int
    splits: dict[str, SplitLengths] = field(default_factory=dict)

    def of(self, split: str) -> SplitLengths:
        return self.splits.setdefault(split, SplitLengths())

    @property
    def cut(self) -> dict[str, tuple[int, int]]:
        """Split -> (texts that were cut, all)."""
        return {
            split: (sum(length > self.max_length for length in known.tokens), len(known.tokens))
            for split, known in self.splits.items()
            if known.tokens
        }

    @property
    def of_a_twentieth(self) -> int | None:
        """The shortest max_length that cuts a twentieth of all texts at most; None without any."""
        lengths = sorted(n for known in self.splits.values() for n in known.tokens)
        return lengths[len(lengths) - 1 - len(lengths) // 20] if lengths else None

    def notes(self) -> list[str]:
        """One sentence for each split that is not whole."""
        notes = []
        for split, (longer, texts) in self.cut.items():
            if longer:
                notes.append(
                    f"{longer} of {texts} {split} texts are longer than --max-length "
                    f"{self.max_length} and were cut"
                )
        if 20 * sum(cut for cut, _ in self.cut.values()) > sum(n for _, n in self.cut.values()):
            notes[-1] += f" (--max-length {self.of_a_twentieth} would cut a twentieth)"
        for split, known in self.splits.items():
            if known.dropped:
                notes.append(
                    f"{known.dropped} {split} texts are too short to learn from and were dropped"
                )
        return notes


def tokenise(part: Texts, task: Task, limit: int, tokenizer: Any, lengths: SplitLengths) -> Rows:
    """Rows of at most `limit` tokens; what cutting did is added to `lengths`."""
    # verbose: no warning about the model's longest input, since rows are cut right here
    ids = tokenizer(part.texts, add_special_tokens=True, verbose=False)["input_ids"]
    if part.is_stream:
        stream = ids[0]
        tokens = [tuple(stream[i : i + limit]) for i in range(0, len(stream), limit)]
    else:
        tokens = [tuple(row[:limit]) for row in ids]
        lengths.tokens += [len(row) for row in ids]
    # a language model learns from a row's second token on
    least = 2 if task.unit == "token" else 1
    kept = [i for i, row in enumerate(tokens) if len(row) >= least]
    if not part.is_stream:
        lengths.dropped += len(tokens) - len(kept)
    return Rows(tokens, part.labels).keep(kept)
