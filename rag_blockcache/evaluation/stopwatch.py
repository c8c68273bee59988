"""Times that can be compared: synchronized clocks, runs in turn, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Clock:
    """Reads the time when all work submitted to a device is done.

    Args:
        device: Where the work runs; a CPU has nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        """Return seconds since some fixed point."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """Some measurements of one thing.

    Attributes:
        median: The middle one.
        min: The smallest.
        max: The largest.
    """

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise at least one value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Summarise the ratios of measurements taken in pairs: what slows both of a pair cancels out."""
    return Spread.of(one / other for one, other in zip(numerators, denominators, strict=True))


def in_turn(
    runs: Mapping[str, Callable[[], Result]],
    repeats: int,
    on_round: Callable[[int], None] | None = None,
) -> tuple[dict[str, Result], dict[str, list[Result]]]:
    """Run everything once to warm up, then ``repeats`` rounds in which each run has its turn.

    Args:
        runs: What to run, by name, in the order in which they take turns.
        repeats: Number of rounds, at least 1.
        on_round: Called before each round with its number; 0 is the warm-up.

    Returns:
        What each run returned in the warm-up, and in each round.
    """
    tell = on_round or (lambda _: None)
    tell(0)
    warm_up = {name: run() for name, run in runs.items()}
    measured: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(1, repeats + 1):
        tell(number)
        for name, run in runs.items():
            measured[name].append(run())
    return warm_up, measured
