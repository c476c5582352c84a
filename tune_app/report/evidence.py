"""How certain a difference is that was measured with a few seeds and some test rows.

Two things are random: the seeds (initial prompts and data order) and the rows of the test split.
The interval allows for both.

Seeds: runs with the same seed are compared in pairs, with Student's t on their differences, which
has one degree of freedom less than there are pairs. Rows: Student's t on the differences per row,
averaged over the seeds, minus the interaction of seeds and rows (the residual of the two-way
layout: Searle, Casella and McCulloch 1992), which the seeds' part already includes. A metric that
is not a mean over rows (macro F1, perplexity, a mean over tokens) is divided into rows by the
jackknife's pseudo-values (Tukey 1958), whose variance errs on the large side (Efron and Stein
1981).

The squares of both half-widths are added. That is wider than Cochran's solution of the
Behrens-Fisher problem (Cochran 1964), which keeps its level, so it errs on the safe side. Welch's
and Satterthwaite's degrees of freedom would not: with three seeds and equal parts of seeds and
rows, their 95 % interval misses in 5.7 % of cases, with two seeds in 7 to 12 %.

The seeds come in looks: after 3 pairs, 6, 12, and so on. Each look spends a part of the 5 % by
which the whole answer may be wrong, whatever was seen before (alpha spending: Lan and DeMets 1983).
The parts add up, so no joint distribution has to be assumed (Bonferroni's bound); for the t of
three pairs there is none. What is left after the second look is halved each time, so that a
confirmation can always be extended later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.05  # the probability that an answer is wrong, over all of its looks
FIRST_LOOK = 3  # pairs of runs
_EARLY_SHARES = (0.4, 0.4)  # of LEVEL, spent by the first two looks


def level_of(look: int) -> float:
    """The part of LEVEL that look number `look` (from 1) spends; all possible looks add up to it.

    >>> [round(level_of(look), 4) for look in (1, 2, 3, 4)]
    [0.02, 0.02, 0.005, 0.0025]
    """
    if look <= len(_EARLY_SHARES):
        return LEVEL * _EARLY_SHARES[look - 1]
    return LEVEL * (1 - sum(_EARLY_SHARES)) * 0.5 ** (look - len(_EARLY_SHARES))


def next_look(pairs: int, most: int) -> int:
    """How many pairs the next look has, at most `most`; if it equals `pairs`, there is none.

    >>> [next_look(n, 10) for n in (0, 1, 3, 6, 10)]
    [3, 3, 6, 10, 10]
    """
    due = FIRST_LOOK
    while due <= pairs:
        due *= 2
    return max(pairs, min(due, most))


@dataclass(frozen=True)
class Interval:
    """An interval around a mean: `mean` plus or minus `half`.

    level: the probability that it misses the true value
    half: NaN for fewer than two seeds
    """

    mean: float
    level: float
    seed_half: float = math.nan
    row_half: float = 0.0

    @property
    def half(self) -> float:
        return math.hypot(self.seed_half, self.row_half)

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values_S: np.ndarray, rows_SR: np.ndarray | None, level: float) -> Interval:
    """The interval that misses the true value with a probability of at most `level`.

    values_S: one value for each seed
    rows_SR: the same for each row; None if the rows are not known
    """
    seeds = len(values_S)
    if seeds == 0:
        return Interval(math.nan, level)
    mean = float(values_S.mean())
    if seeds == 1:
        return Interval(mean, level)
    rows = 0.0 if rows_SR is None else half_width(_row_deviation(rows_SR), rows_SR.shape[1], level)
    return Interval(mean, level, half_width(float(values_S.std(ddof=1)), seeds, level), rows)


def _row_deviation(rows_SR: np.ndarray) -> float:
    """The standard deviation of the rows' own part."""
    seeds, rows = rows_SR.shape
    by_seed_S, by_row_R = rows_SR.mean(axis=1), rows_SR.mean(axis=0)
    residual_SR = rows_SR - by_seed_S[:, None] - by_row_R + rows_SR.mean()
    shared = float((residual_SR**2).sum()) / ((seeds - 1) * (rows - 1)) / seeds
    return math.sqrt(max(float(by_row_R.var(ddof=1)) - shared, 0.0))


def half_width(deviation: float, count: int, level: float) -> float:
    """Half of Student's interval around a mean of `count` values with this standard deviation."""
    return float(stdtrit(count - 1, 1 - level / 2)) * deviation / math.sqrt(count)


def pairs_needed(found: Interval, pairs: int, looks: int, distance: float, most: int) -> int | None:
    """The number of pairs at which a later look would have a half-width below `distance`, if the
    standard deviations stay the same; None if `most` pairs are not enough."""
    if not math.isfinite(found.half):
        return None
    deviation = found.seed_half / half_width(1.0, pairs, found.level)
    at, look = pairs, looks
    while (later := next_look(at, most)) > at:
        at, look = later, look + 1
        if math.hypot(half_width(deviation, at, level_of(look)), found.row_half) < distance:
            return at
    return None
