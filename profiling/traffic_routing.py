"""How many distinct experts or rows a batch uses, for uniform and for skewed choices.

Tokens are taken to choose independently of each other. Those of one document do not: neighbours
choose alike, so a real batch of them uses fewer members than these expectations say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


def expected_distinct(population: int, taken: float, batch: float) -> float:
    """Expected number of distinct members after ``batch`` independent draws of ``taken`` each.

    Choices are uniform. A member is missed by one draw of k out of X without replacement with
    probability 1 - k/X: X (1 - (1 - k/X)^B).
    """
    if taken >= population:
        return float(population) if batch > 0 else 0.0
    # log1p keeps the difference from 1 that matters when the population is large.
    return -population * math.expm1(batch * math.log1p(-taken / population))


@dataclass(frozen=True, eq=False)
class Routing:
    """How likely a token is to use each member of a population: experts, or rows of a window.

    Members of equal probability are held as one, so that counts of a million rows, most of them
    small integers, cost little to evaluate.
    """

    population: int
    log_missed: NDArray[np.float64]
    """[g] log of the probability that a token does not use a member of the group."""
    members: NDArray[np.float64]
    """[g] members of the group; members that are never used are in none."""

    @classmethod
    def from_counts(cls, counts: ArrayLike, tokens: int) -> Routing:
        """Choices as skewed as in a sample.

        Members that the sample never used count as impossible, so that batches longer than the
        sample are underestimated: take the sample long.

        Args:
            counts: integers [population], tokens of the sample that used each member. A token that
                used a member twice counts once.
            tokens: length of the sample.

        Raises:
            TypeError: counts that are not integers.
            ValueError: counts that are not one-dimensional, or not in [0, tokens].
        """
        found = np.asarray(counts)
        if not np.issubdtype(found.dtype, np.integer):
            raise TypeError(f"counts: must be integers, got {found.dtype}")
        if found.ndim != 1 or found.size == 0:
            raise ValueError(f"counts: must be [population], not empty, got {list(found.shape)}")
        if tokens < 1 or found.min() < 0 or found.max() > tokens:
            raise ValueError(
                f"counts: must be in [0, tokens], got {found.min()} to {found.max()} of "
                f"{tokens} tokens"
            )
        values, members = np.unique(found[found > 0], return_counts=True)
        with np.errstate(divide="ignore"):  # every token used it: missed with probability 0
            log_missed = np.log1p(-values / tokens)
        return cls(found.size, log_missed, members.astype(np.float64))

    @classmethod
    def zipf(cls, population: int, draws: int, exponent: float = 1.0) -> Routing:
        """The k-th hottest member is drawn with probability proportional to k^-exponent.

        A token makes ``draws`` independent draws, and can draw a hot member twice, as it does where
        several virtual slots share a row. An exponent of 0 is uniform.

        Raises:
            ValueError: a population or number of draws below 1, or a negative exponent.
        """
        if population < 1 or draws < 1 or exponent < 0:
            raise ValueError(
                "population and draws: must be at least 1, exponent not negative, got "
                f"{population}, {draws}, {exponent}"
            )
        weights = np.arange(1, population + 1, dtype=np.float64) ** -exponent
        with np.errstate(divide="ignore"):  # a single member is drawn always
            log_missed = draws * np.log1p(-weights / weights.sum())
        return cls(population, log_missed, np.ones(population))

    def expected_distinct(self, tokens: float) -> float:
        """Expected number of distinct members after so many tokens: sum of 1 - (1 - p_i)^tokens."""
        if tokens <= 0:
            return 0.0
        return float(-(self.members * np.expm1(tokens * self.log_missed)).sum())
