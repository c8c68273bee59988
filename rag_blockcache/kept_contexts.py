"""Contexts of answers that were given, kept for prompts that begin as theirs did.

The next turn of a chat, the next step of an agent and another question over the same passages begin with
tokens whose keys and values stand in a context already. They are used from there, neither loaded nor placed
nor computed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rag_blockcache.assembler import Context
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan

_FEWEST = 64  # shared slots; below that a context is as soon made anew


@dataclass(frozen=True)
class _Kept:
    """A context, and what its slots hold.

    Attributes:
        context: Of one prompt, with the tokens of its answer behind it.
        token_ids: Of its slots, ``(num_slots,)``.
        origins: Where their keys and values came from, same shape; see ``Plan.origins``.
    """

    context: Context
    token_ids: NDArray[np.int64]
    origins: NDArray[np.int64]


class KeptContexts:
    """Keeps the contexts of the latest answers, within a budget.

    A slot can be used again if everything up to it is the same: the tokens, and which of them were placed
    from which block. Keys and values are causal, so what follows does not matter. Policies that look at the
    request compute other slots for another question; theirs are not kept.

    Args:
        model: Whose contexts they are.
        budget_bytes: Of all that are kept; 0 keeps none.

    Raises:
        InvalidInputError: If the budget is negative.
    """

    def __init__(self, model: Model, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise InvalidInputError(f"context_budget_bytes is {budget_bytes}; use 0 to keep no contexts")
        self._model, self._budget_bytes = model, budget_bytes
        self._kept: list[_Kept] = []  # the latest last
        self._cleared = float("-inf")  # when, by the clock of ``Plan.start``
        self._lock = threading.Lock()

    def take(self, plan: Plan, room: int) -> Context | None:
        """Return a context that holds the beginning of a prompt, and tell its plan how much; None without.

        Whoever takes a context has it alone, and gives it back with ``keep``.

        Args:
            plan: Of the prompt.
            room: Slots wanted behind the prompt.
        """
        if not self._kept or not self._is_lasting(plan, plan.num_tokens):
            return None
        token_ids, origins = np.array(plan.token_ids), plan.origins()
        with self._lock:
            shared = [_num_shared(kept, token_ids, origins) for kept in self._kept]
            best = max(range(len(shared)), key=shared.__getitem__, default=None)
            if best is None:
                return None
            num_shared = plan.whole_blocks(min(shared[best], plan.num_tokens - 1))
            # A long context is not given up for a short beginning that it shares with any other prompt.
            if num_shared < max(_FEWEST, len(self._kept[best].token_ids) // 2):
                return None
            kept = self._kept.pop(best)
        plan.num_kept = num_shared
        return kept.context.continued(self._model, num_shared, plan.num_tokens, room=room)

    def keep(self, plan: Plan, context: Context, answer: Sequence[int]) -> None:
        """Keep the context of a prompt that was answered.

        Args:
            plan: Of the prompt.
            context: Its slots, those of the answer included.
            answer: Token ids of the answer.
        """
        num_slots = min(context.length, plan.num_tokens + len(answer))
        if context.num_bytes > self._budget_bytes or not self._is_lasting(plan, num_slots):
            return
        if len(context.starts) > 1:  # beams
            return
        token_ids = np.array([*plan.token_ids, *answer][:num_slots])
        origins = np.zeros(num_slots, dtype=np.int64)
        origins[: plan.num_tokens] = plan.origins()[:num_slots]
        with self._lock:
            if plan.start <= self._cleared:  # it may hold what was forgotten meanwhile
                return
            self._kept.append(_Kept(context, token_ids, origins))
            while sum(each.context.num_bytes for each in self._kept) > self._budget_bytes:
                self._kept.pop(0)

    def clear(self) -> None:
        """Let go of all of them, and of those of requests that are under way."""
        with self._lock:
            self._kept.clear()
            self._cleared = time.perf_counter()

    def _is_lasting(self, plan: Plan, num_slots: int) -> bool:
        """Return whether keys and values are the same in a longer prompt, and for another question."""
        return not plan.policy.looks and self._model.regime(num_slots) == plan.regime == ""


def _num_shared(kept: _Kept, token_ids: NDArray[np.int64], origins: NDArray[np.int64]) -> int:
    """Return how many slots of a prompt, from the first on, stand in a kept context."""
    num_slots = min(len(token_ids), len(kept.token_ids))
    differs = (kept.token_ids[:num_slots] != token_ids[:num_slots]) | (
        kept.origins[:num_slots] != origins[:num_slots]
    )
    return int(differs.argmax()) if differs.any() else num_slots
