"""Intervals by paired bootstrap: questions are drawn again, and every arm is judged on the same draw.

All that is measured is a ratio of two sums over questions (right answers over questions, divergence over
tokens). ``draws`` holds the ratio of the sample itself first, then that of each resample, so a difference, or
an average over benchmarks, is plain arithmetic on draws of the same questions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.float64]

# Questions below which nothing is shown with 95 % confidence, even if all of them point one way (sign test):
# 2 · ½⁵ is above 5 %, 2 · ½⁶ is not. Resamples of fewer look surer than they are.
FEWEST = 6


@dataclass(frozen=True)
class Interval:
    """A measured value, and where 95 % of its resamples lie.

    Attributes:
        value: Of the questions themselves.
        low: The 2.5th percentile of the resamples.
        high: The 97.5th.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Draws) -> Interval:
        """Summarise draws, the sample itself first; resamples with nothing to divide by are left out."""
        drawn = draws[1:]
        low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
        return cls(float(draws[0]), float(low), float(high))

    @property
    def holds_zero(self) -> bool:
        """Whether a difference may as well be none."""
        return self.low <= 0 <= self.high


class Resamples:
    """How often each row of a sample counts, in the sample itself and in each resample.

    Args:
        questions: Name of the question behind each row, one at least; rows of one question, asked in several
            variants, are drawn together.
        num_resamples: How often questions are drawn again.
        seed: The same seed and number of questions give the same draws.
    """

    def __init__(self, questions: Sequence[Hashable], *, num_resamples: int = 2000, seed: int = 0) -> None:
        numbers = {question: number for number, question in enumerate(dict.fromkeys(questions))}
        chances = np.full(len(numbers), 1 / len(numbers))
        drawn = np.random.default_rng(seed).multinomial(len(numbers), chances, num_resamples)
        rows = drawn[:, [numbers[question] for question in questions]]
        self._counts = np.concatenate([np.ones((1, len(questions))), rows])  # (1 + num_resamples, rows)

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Draws:
        """Return the draws of one sum over another.

        Args:
            numerators: One a row.
            denominators: One a row; None counts rows, which makes it a mean.
        """
        below = np.ones(len(numerators)) if denominators is None else np.asarray(denominators, dtype=float)
        sums = self._counts @ np.stack([np.asarray(numerators, dtype=float), below], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold nothing to divide by
            return np.asarray(sums[:, 0] / sums[:, 1])
