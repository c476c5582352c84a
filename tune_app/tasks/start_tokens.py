"""What prompts can be initialised with: tokens of the model's vocabulary, chosen by the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

# How many of the most frequent tokens `init: vocab` draws from: the number of Lester et al. 2021,
# "The Power of Scale for Parameter-Efficient Prompt Tuning", section 3.2.
MOST_FREQUENT = 5000


@dataclass(frozen=True)
class StartTokens:
    """Token ids without special tokens; empty if a search has none of that kind.

    `frequent` are the most frequent tokens of the training rows, not the first ids of the
    tokenizer: not every tokenizer orders its ids by frequency, and these fit the task's subject.
    """

    frequent: tuple[int, ...] = ()  # the most frequent one first
    text: tuple[int, ...] = ()  # of --init-text
    class_names: tuple[tuple[int, ...], ...] = ()  # by class index


def start_tokens(
    rows: Iterable[Sequence[int]],
    class_names: Sequence[str],
    init_text: str | None,
    tokenizer: Any,
) -> StartTokens:
    """The start tokens for training rows, given as token ids."""
    counts = Counter(chain.from_iterable(rows))
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return StartTokens(
        frequent=tuple(frequent[:MOST_FREQUENT]),
        text=tokens(init_text) if init_text else (),
        class_names=tuple(tokens(name) for name in class_names),
    )
