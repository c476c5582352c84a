"""Which rows are used for validation and test, and on which of them trials are compared.

Rows are chosen by a hash of their tokens, stratified by class: the same rows for every seed, file
order and machine. Equal rows stay together.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tune_app.tasks.base import Labels

Tokens = tuple[int, ...]
_BINS = 10  # strata of labels that are numbers, by size


@dataclass
class Rows:
    """One split: token ids by row, and the class name or number of each row if it has one.

    learned_from: for each row, the first token that counts in the loss (the completion after its
        prompt); None: all do
    """

    tokens: list[Tokens]
    labels: list[Any] | None
    learned_from: list[int] | None = None

    def keep(self, indices: Iterable[int]) -> Rows:
        indices = list(indices)

        def kept(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in indices]

        return Rows([self.tokens[i] for i in indices], kept(self.labels), kept(self.learned_from))


def split_off(rows: Rows, count: int, labels: Labels, *, later: int) -> tuple[Rows, Rows]:
    """(the rest, about `count` different rows with all their repetitions), stratified by class.

    Each class gives at least one row. A class stays whole if nothing of it would be left for
    training and for the `later` splits still to be taken.
    """
    strata = _strata(rows, labels)
    wanted = _shares({name: len(known) for name, known in strata.items()}, count)
    taken: set[Tokens] = set()
    for name, known in strata.items():
        # Every split should have every class; the single stratum of unlabelled rows is not a class.
        least = 2 + later if labels == "classes" else 1
        if len(known) >= least:
            taken.update(known[: max(wanted[name], 1 if labels == "classes" else 0)])
    inside = [row in taken for row in rows.tokens]
    return (
        rows.keep(i for i, is_in in enumerate(inside) if not is_in),
        rows.keep(i for i, is_in in enumerate(inside) if is_in),
    )


def sample(rows: Rows, count: int, labels: Labels) -> Rows:
    """`count` of the rows, stratified by class; all of them if there are no more."""
    if len(rows.tokens) <= count:
        return rows
    return rows.keep(_sampled(rows, count, labels))


def begin_with_sample(rows: Rows, count: int, labels: Labels) -> Rows:
    """The same rows, `sample(rows, count, labels)` before the others."""
    first = _sampled(rows, count, labels)
    return rows.keep([*first, *sorted(set(range(len(rows.tokens))) - set(first))])


def _sampled(rows: Rows, count: int, labels: Labels) -> list[int]:
    """Which rows the sample has."""
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(_stratum_of_row(rows, labels)):
        strata[stratum].append(i)
    wanted = _shares({name: len(known) for name, known in strata.items()}, count)
    chosen = [
        i
        for name, known in strata.items()
        for i in sorted(known, key=lambda i: _rank(rows.tokens[i]))[: wanted[name]]
    ]
    return sorted(chosen, key=lambda i: (_rank(rows.tokens[i]), i))


def _shares(sizes: dict[Hashable, int], count: int) -> dict[Hashable, int]:
    """`count` divided by the strata's sizes, with the largest remainder method."""
    total = sum(sizes.values())
    exact = {name: min(count, total) * size / total for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = min(count, total) - sum(shares.values())
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], str(name)))
    for name in by_remainder[:left]:
        shares[name] += 1
    return shares


def _strata(rows: Rows, labels: Labels) -> dict[Hashable, list[Tokens]]:
    """Stratum -> its different rows, in the order in which they are taken. A text with several
    labels counts as its most frequent one."""
    votes: dict[Tokens, Counter[Hashable]] = defaultdict(Counter)
    for row, stratum in zip(rows.tokens, _stratum_of_row(rows, labels), strict=True):
        votes[row][stratum] += 1
    strata: dict[Hashable, list[Tokens]] = defaultdict(list)
    for row in sorted(votes, key=_rank):
        strata[min(votes[row], key=lambda name: (-votes[row][name], str(name)))].append(row)
    return strata


def _stratum_of_row(rows: Rows, labels: Labels) -> Sequence[Hashable]:
    """Each row's class, or the quantile of its number."""
    if rows.labels is None:
        return [0] * len(rows.tokens)
    if labels == "classes":
        return rows.labels
    size = len(rows.labels)
    bins = max(1, min(_BINS, size // _BINS))
    places = {i: place for place, i in enumerate(sorted(range(size), key=rows.labels.__getitem__))}
    return [places[i] * bins // size for i in range(size)]


def _rank(row: Tokens) -> bytes:
    return hashlib.sha256(repr(row).encode()).digest()
