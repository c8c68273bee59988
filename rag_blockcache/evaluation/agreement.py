"""How close an arm comes to full attention: their distributions along full attention's own answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def compare(full: Tensor, arm: Tensor, answer: Sequence[int]) -> Agreement:
    """Compare log-probabilities along an answer.

    Args:
        full: What full attention finds at each token, ``(num_tokens, vocab_size)``.
        arm: What the arm finds, same shape.
        answer: Token ids of full attention's answer.
    """
    terms = torch.where(full > float("-inf"), full.exp() * (full - arm), 0.0)  # 0 log 0 is 0
    same = full.argmax(dim=-1) == arm.argmax(dim=-1)
    measured = torch.stack((terms.sum(dim=-1), same.float(), _chosen(arm, answer))).double().cpu()
    divergence, num_same, log_likelihood = measured.sum(dim=-1).tolist()
    return Agreement(
        num_tokens=len(answer),
        divergence=max(0.0, divergence),  # rounding may leave a little less than nothing
        num_same=round(num_same),
        log_likelihood=log_likelihood,
        first_divergence=max(0.0, float(measured[0, 0])),
        first_is_same=bool(measured[1, 0]),
    )


def log_likelihood(log_probabilities: Tensor, answer: Sequence[int]) -> float:
    """Return the log-likelihood of an answer along which log-probabilities were taken, in nats."""
    return float(_chosen(log_probabilities, answer).double().sum())


def _chosen(log_probabilities: Tensor, answer: Sequence[int]) -> Tensor:
    tokens = torch.tensor(answer, device=log_probabilities.device)
    return log_probabilities.gather(1, tokens[:, None])[:, 0]
