"""When a policy is given up: a bet at fair odds that its answers stray too far from full attention.

Let x be the divergence of an answer over what is allowed. If x is 1 on average at most, whatever the answers
before were like, then so is the factor 1 + stake · (x - 1), and the product of these factors is the capital
of somebody who bets on the contrary. It starts anew whenever it falls below 1, so that a long time of good
answers does not hide what comes after it. Such a capital takes 1,000 answers on average, or more, to reach
1,000 as long as x is 1 on average, and far more below that. Above, it grows exponentially: where x is 2 on
average, some dozens of answers are enough. One may look after every answer, and nothing is assumed of how
divergences are distributed but that none is negative. What a single answer counts for is bounded, which makes
the bet more careful, not less.

This is the CUSUM e-detector of Shin, Ramdas and Rinaldo, https://arxiv.org/abs/2203.03532.
"""

from __future__ import annotations

import dataclasses

from rag_blockcache.policy_record import WatchedPolicy

_STAKE = 0.25  # of the capital; more is quicker far above what is allowed, less is quicker just above it
_MOST = 17.0  # that one answer counts for: its factor is 5, so no four answers are enough
_ENOUGH = 1000.0


def weighed(
    seen: WatchedPolicy, num_tokens: int, divergence: float, num_same: int, *, threshold: float
) -> WatchedPolicy:
    """Add one compared answer to what was seen of a policy, and give it up if that is enough.

    Args:
        seen: What was seen before; evidence of another threshold counts for nothing.
        num_tokens: Tokens that were compared.
        divergence: Sum over them of KL(full ‖ policy), in nats.
        num_same: At how many both find the same token likeliest.
        threshold: Most nats a token that are allowed.
    """
    divergence = max(0.0, divergence)  # rounding may leave a little less than nothing
    excess = min(divergence / num_tokens / threshold, _MOST)
    capital = max(1.0, seen.evidence) if seen.threshold == threshold else 1.0
    evidence = min(capital * (1 + _STAKE * (excess - 1)), _ENOUGH)
    return dataclasses.replace(
        seen,
        num_answers=seen.num_answers + 1,
        num_tokens=seen.num_tokens + num_tokens,
        divergence_sum=seen.divergence_sum + divergence,
        num_same=seen.num_same + num_same,
        evidence=evidence,
        threshold=seen.threshold if seen.is_given_up else threshold,
        is_given_up=seen.is_given_up or evidence >= _ENOUGH,
    )
