"""Prompts that went through the prefill pass: scored along given answers, and answered many at a time.

What is measured is the serving path: prompts are planned, prefilled and decoded by what serves them. Only
who shares a pass differs. Rows of all arms are decoded in step, and those that have ended make room.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rag_blockcache.assembler import Context
from rag_blockcache.block_cache import BlockCache
from rag_blockcache.generator import Computed, decode, prefill
from rag_blockcache.model import Model
from rag_blockcache.monitor import Monitor
from rag_blockcache.plan import Plan
from rag_blockcache.request import Question

# Prompts in a prefill pass; any number elsewhere. On a CPU one alone is soonest, for it needs no dense mask.
_TOGETHER = {"cpu": 1}
_STAGE = 32  # tokens that are decoded before rows that have ended are left out; leaving out is a copy

# The likeliest token each time, up to where the model ends, whatever its generation configuration says.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "stop_strings": None,
}


@dataclass(frozen=True)
class Prefilled:
    """Prompts of one arm that went through a prefill pass together.

    Attributes:
        model: The model.
        plans: One a row, with what was reused.
        context: Their slots, all filled, and room for an answer.
        first_logits: ``(batch, 1, vocab_size)``.
    """

    model: Model
    plans: Sequence[Plan]
    context: Context
    first_logits: Tensor

    @torch.inference_mode()
    def along(self, answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return what the model finds of each token of given answers.

        The tokens of an answer are computed in one pass, over slots that are what they are in use.

        Args:
            answers: Token ids, an answer a row, none of them empty or longer than there is room for.

        Returns:
            Log-probabilities of all tokens at each place of an answer, ``(num_tokens, vocab_size)``, float32.
        """
        context, logits, width = self.context, self.first_logits, max(map(len, answers)) - 1
        if width:
            places = [torch.arange(plan.num_tokens, plan.num_tokens + width) for plan in self.plans]
            shown = [torch.tensor([*answer, *[0] * width][:width]) for answer in answers]
            context.length += width
            more = prefill(self.model, context, list(map(Computed, places, shown)), num_logits=width)
            context.crop(-width)
            logits = torch.cat((logits, more), dim=1)
        pairs = zip(logits, answers, strict=True)
        return [row[: len(answer)].float().log_softmax(dim=-1) for row, answer in pairs]


def prefill_prompts(
    cache: BlockCache, questions: Sequence[Question], policy: str, *, room: int
) -> list[Prefilled]:
    """Prefill the prompts of questions as they are served, with room for an answer of so many tokens."""
    model = cache.model
    step = _TOGETHER.get(model.device.type, len(questions))
    start = time.perf_counter()
    plans = cache._planner.plan_batch(questions, policy=policy, max_new_tokens=room, start=start)
    found = []
    for first in range(0, len(plans), step):
        together = plans[first : first + step]
        context, logits, _ = cache._prefill(together, room=room)
        found.append(Prefilled(model, together, context, logits))
    return found


@dataclass
class _Row:
    """A prompt that is being answered.

    Attributes:
        plan: Of the prompt.
        context: Holds its slots, those of the answer's last token excepted.
        place: Its row there.
        logits: Of the first token of the answer, ``(1, vocab_size)``.
        answer: Its tokens so far.
    """

    plan: Plan
    context: Context
    place: int
    logits: Tensor
    answer: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode_together(prefilled: Sequence[Prefilled], max_new_tokens: int) -> list[list[int]]:
    """Answer prompts, which may be of several arms, in step; what was prefilled stays as it is.

    Returns:
        Token ids of the answer to each prompt, the one that ended it included.
    """
    rows = [
        _Row(plan, each.context, place, each.first_logits[place])
        for each in prefilled
        for place, plan in enumerate(each.plans)
    ]
    for regime in dict.fromkeys(row.plan.regime for row in rows):  # the model turns all rows of a batch alike
        alike = [row for row in rows if row.plan.regime == regime]
        _decode(prefilled[0].model, alike, max_new_tokens)
    return [row.answer for row in rows]


def _decode(model: Model, rows: Sequence[_Row], max_new_tokens: int) -> None:
    """Answer prompts a stage at a time, leaving out those whose answer has ended."""
    while rows:
        num_left = max_new_tokens - len(rows[0].answer)
        context = _joined(model, rows, room=num_left)
        decoded = decode(
            model,
            context,
            [[*row.plan.token_ids, *row.answer] for row in rows],
            _next_logits(model, context, rows),
            max_new_tokens=min(_STAGE, num_left),
            monitor=Monitor(),
            options=GREEDY,
        )
        for place, (row, found) in enumerate(zip(rows, decoded, strict=True)):
            row.answer += found.token_ids
            row.context, row.place = context, place
        is_last = num_left <= _STAGE
        rows = [
            row
            for row, found in zip(rows, decoded, strict=True)
            if found.finish_reason == "length" and not is_last
        ]


def _joined(model: Model, rows: Sequence[_Row], *, room: int) -> Context:
    """Copy rows of any contexts into one of their own."""
    starts = [row.context.starts[row.place] for row in rows]
    lengths = [row.context.length - start for row, start in zip(rows, starts, strict=True)]
    joined = Context(model, lengths, room=room)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        slots = slice(joined.starts[place], joined.length)
        pairs: Iterable[tuple[Any, Any]] = zip(joined.layers, row.context.layers, strict=True)
        for target, source in pairs:
            target.keys[place, :, slots] = source.keys[row.place, :, start : row.context.length]
            target.values[place, :, slots] = source.values[row.place, :, start : row.context.length]
    return joined


def _next_logits(model: Model, context: Context, rows: Sequence[_Row]) -> Tensor:
    """Return the logits of the next token, ``(batch, 1, vocab_size)``; computes the last one there is."""
    if not rows[0].answer:
        return torch.stack([row.logits for row in rows])
    places = [row.plan.num_tokens + len(row.answer) - 1 for row in rows]
    newest = [
        Computed(torch.tensor([at]), torch.tensor(row.answer[-1:]))
        for at, row in zip(places, rows, strict=True)
    ]
    context.length += 1
    return prefill(model, context, newest)
