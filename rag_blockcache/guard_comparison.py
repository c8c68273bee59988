"""One answer under the policy that gave it, and under full attention: how far apart the two are.

Both are run along the answer that was given. It is what the user read, so distributions are compared where
the policy has led; and whatever was drawn or forced into it, both are asked about the same text. It also
costs the least: full attention takes prompt and answer in one go, where an answer of its own would have to be
decoded token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_blockcache.assembler import Context
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan

_CHUNK = 256  # prompt tokens a pass: the longest that a request has to wait

Serve = Callable[..., tuple[Context, Tensor, Any]]


@dataclass(frozen=True)
class ServedAnswer:
    """An answer, and how it was come by.

    Attributes:
        plan: Of its request, as it was served.
        token_ids: What the answer begins with, one token at least.
        serve: Prefills a plan as requests are prefilled; see ``BlockCache._prefill``.
    """

    plan: Plan
    token_ids: tuple[int, ...]
    serve: Serve


class Comparison:
    """Compares answers with full attention, in passes that are as short as can be.

    Args:
        model: The model.
        give_way: Called before each pass; returns when it may begin.
    """

    def __init__(self, model: Model, give_way: Callable[[], None]) -> None:
        self._model, self._give_way = model, give_way

    @torch.inference_mode()
    def compare(self, answer: ServedAnswer) -> tuple[float, int]:
        """Return KL(full ‖ policy) over an answer, in nats, and how many tokens both find likeliest."""
        full, policy = self._full(answer), self._served(answer)
        terms = torch.where(full > float("-inf"), full.exp() * (full - policy), 0.0)  # 0 log 0 is 0
        num_same = int((full.argmax(dim=-1) == policy.argmax(dim=-1)).sum())
        return float(terms.double().sum()), num_same

    def _full(self, answer: ServedAnswer) -> Tensor:
        """Return full attention's log-probabilities at each token, ``(num_tokens, vocab_size)``."""
        token_ids = torch.tensor([*answer.plan.token_ids, *answer.token_ids[:-1]])
        context = Context(self._model, [len(token_ids)])
        num_new = len(answer.token_ids)
        start, last = 0, len(token_ids) - num_new
        # A model with two sets of rotary frequencies must see the last position to choose: one pass.
        while start < last and not answer.plan.regime:
            stop = min(start + _CHUNK, last)
            self._pass(context, token_ids, start, stop)
            start = stop
        return self._pass(context, token_ids, start, len(token_ids), num_logits=num_new)

    def _served(self, answer: ServedAnswer) -> Tensor:
        """Return the policy's log-probabilities likewise, its prompt prefilled as it was served."""
        self._give_way()
        token_ids = torch.tensor([*answer.plan.token_ids, *answer.token_ids[:-1]])
        start, end = answer.plan.num_tokens, len(token_ids)
        context, logits, _ = answer.serve([answer.plan], room=end - start)
        first = logits[0].float().log_softmax(dim=-1)
        if start == end:
            return first
        return torch.cat([first, self._pass(context, token_ids, start, end, num_logits=end - start)])

    def _pass(
        self, context: Context, token_ids: Tensor, start: int, stop: int, *, num_logits: int = 1
    ) -> Tensor:
        self._give_way()
        context.length = stop
        computed = Computed(torch.arange(start, stop), token_ids[start:stop])
        logits = prefill(self._model, context, [computed], num_logits=num_logits)
        return logits[0].float().log_softmax(dim=-1)
