"""Distributions along a given answer, read while the engine decodes it as it decodes any other.

A logits processor sees the scores of every step and then leaves one token to choose. So what is measured is
the serving path itself: a policy that looks at the question before it chooses what to compute again sees the
question only, as it does in use, and rows that write their own answer can stand in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class TeacherForcing:
    """A logits processor that makes some rows of a batch write given answers, and free rows their own.

    Args:
        answers: Token ids that a row must write, by row.
        end: Token that ends a row behind its answer.
        observe: Called at every step, from 0, with the log-probabilities of all rows before any is forced,
            ``(batch, vocab_size)``.
    """

    def __init__(
        self, answers: Mapping[int, Sequence[int]], end: int, observe: Callable[[int, Tensor], None]
    ) -> None:
        self._answers, self._end, self._observe = answers, end, observe
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at one step; called by transformers."""
        step, self._step = self._step, self._step + 1
        self._observe(step, scores.float().log_softmax(dim=-1))
        if not self._answers:
            return scores
        rows = torch.tensor(list(self._answers), device=scores.device)
        tokens = [answer[step] if step < len(answer) else self._end for answer in self._answers.values()]
        forced = scores.clone()
        forced[rows] = float("-inf")
        forced[rows, torch.tensor(tokens, device=scores.device)] = 0.0
        return forced


class Reference:
    """Keeps what full attention gives at every step of its answers.

    Attributes:
        steps: Log-probabilities of each step, ``(batch, vocab_size)``.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def observe(self, step: int, log_probabilities: Tensor) -> None:
        """Take note of one step."""
        self.steps.append(log_probabilities)


@dataclass(frozen=True)
class Agreement:
    """How close an arm comes to full attention along the latter's own answer.

    Attributes:
        num_tokens: Tokens compared, the end of the answer included.
        divergence: Sum over tokens of KL(full ‖ arm), in nats.
        num_same: Tokens at which both find the same token likeliest.
        log_likelihood: Of the answer under the arm, in nats.
        first_divergence: Divergence at the first token.
        first_is_same: Whether both begin with the same token.
    """

    num_tokens: int
    divergence: float
    num_same: int
    log_likelihood: float
    first_divergence: float
    first_is_same: bool


class Comparison:
    """Compares the rows of a batch that are forced along the reference's answers.

    Args:
        reference: Of the same questions, in the order of ``answers``.
        answers: Token ids of full attention's answers.
        first_row: Row of the first of them in the batch; the others follow.
    """

    def __init__(self, reference: Reference, answers: Sequence[Sequence[int]], first_row: int = 0) -> None:
        self._reference, self._answers = reference, answers
        self._rows = slice(first_row, first_row + len(answers))
        self._steps: list[Tensor] = []  # each (3, rows): divergence, same token, log-probability

    def observe(self, step: int, log_probabilities: Tensor) -> None:
        """Compare one step."""
        if step >= max(map(len, self._answers)):
            return
        full, arm = self._reference.steps[step], log_probabilities[self._rows]
        terms = torch.where(full > float("-inf"), full.exp() * (full - arm), 0.0)  # 0 log 0 is 0
        same = full.argmax(dim=-1) == arm.argmax(dim=-1)
        tokens = [answer[step] if step < len(answer) else 0 for answer in self._answers]
        chosen = arm.gather(1, torch.tensor(tokens, device=arm.device)[:, None])[:, 0]
        self._steps.append(torch.stack((terms.sum(dim=-1), same.float(), chosen)))

    def agreements(self) -> list[Agreement]:
        """Return the comparison of each answer."""
        measured = torch.stack(self._steps).double().cpu()  # (steps, 3, rows)
        return [_agreement(measured[: len(answer), :, row]) for row, answer in enumerate(self._answers)]


def _agreement(steps: Tensor) -> Agreement:
    divergence, same, log_likelihood = steps.sum(dim=0).tolist()
    return Agreement(
        num_tokens=len(steps),
        divergence=max(0.0, divergence),  # rounding may leave a little less than nothing
        num_same=round(same),
        log_likelihood=log_likelihood,
        first_divergence=max(0.0, float(steps[0, 0])),
        first_is_same=bool(steps[0, 1]),
    )
