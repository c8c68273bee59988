"""The cheapest policy that stays within a loss, from what an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_summary import AVERAGE, AnswerReport
from rag_blockcache.evaluation.arms import NO_PASSAGES
from rag_blockcache.evaluation.bootstrap import FEWEST
from rag_blockcache.policy_record import Calibration


@dataclass(frozen=True)
class MeasuredPolicy:
    """What a policy costs and loses.

    Attributes:
        policy: Its name.
        fidelity: 1 is full attention, 0 is no passages.
        fidelity_low: Lower end of its 95 % interval.
        fidelity_high: Upper end.
        recomputed: Share of the passages' tokens that are computed again.
        ttft_seconds: Median time to first token; None where none was taken.
    """

    policy: str
    fidelity: float
    fidelity_low: float
    fidelity_high: float
    recomputed: float
    ttft_seconds: float | None

    @property
    def loss_at_most(self) -> float:
        """Upper end of the interval of what is lost."""
        return 1 - self.fidelity_low

    @property
    def cost(self) -> tuple[float, float]:
        """What policies are ordered by: how long a user waits, then the share of tokens computed again."""
        return (self.ttft_seconds or 0.0, self.recomputed)


def measured_policies(report: AnswerReport) -> list[MeasuredPolicy]:
    """Return all policies of an evaluation, the cheapest first; several benchmarks count alike.

    Raises:
        InvalidInputError: If fidelity could not be measured, because passages change nothing.
    """
    rows = [row for row in report.rows if row["arm"] != NO_PASSAGES.name]
    rows = [row for row in rows if row["dataset"] == AVERAGE] or rows
    if not all("fidelity" in row for row in rows):
        raise InvalidInputError(
            "the model answers these questions alike with and without their passages, so nothing shows what "
            "reuse loses; give questions that need the passages"
        )
    is_timed = all("ttft_seconds" in row for row in rows)
    return sorted((_measured(row, is_timed) for row in rows), key=lambda each: each.cost)


def _measured(row: Mapping[str, Any], is_timed: bool) -> MeasuredPolicy:
    return MeasuredPolicy(
        policy=row["arm"].split("/")[0],  # how blocks are made is the same for all of them
        fidelity=row["fidelity"],
        fidelity_low=row["fidelity_low"],
        fidelity_high=row["fidelity_high"],
        recomputed=row["recomputed"],
        ttft_seconds=row["ttft_seconds"] if is_timed else None,
    )


def check_number(num_questions: int) -> None:
    """Raise if there are too few questions for an interval that means anything."""
    if num_questions < FEWEST:
        raise InvalidInputError(
            f"{num_questions} questions cannot show what a policy loses; give {FEWEST} at least, and better "
            "some dozens"
        )


def choose_cheapest(
    measured: Sequence[MeasuredPolicy], *, max_loss: float, num_questions: int
) -> Calibration:
    """Choose the cheapest policy that surely loses no more than is allowed.

    It loses 1 - fidelity, and the upper end of that interval must be within ``max_loss``: a policy that has
    only been lucky on a few questions is not chosen. Full attention loses nothing, so there is always one.

    Args:
        measured: The cheapest first, full attention among them.
        max_loss: What may be lost.
        num_questions: How many questions all of them were measured on.

    Raises:
        InvalidInputError: If these are too few.
    """
    check_number(num_questions)
    within = [each for each in measured if each.loss_at_most <= max_loss]
    chosen = within[0]
    dearer: list[MeasuredPolicy] = [chosen]
    for each in measured[measured.index(chosen) + 1 :]:
        if each.fidelity > dearer[-1].fidelity:  # otherwise it costs more and gives less
            dearer.append(each)
    return Calibration(
        policy=chosen.policy,
        dearer=tuple(each.policy for each in dearer[1:]),
        num_questions=num_questions,
        fidelity=chosen.fidelity,
        fidelity_low=chosen.fidelity_low,
        max_loss=max_loss,
    )
