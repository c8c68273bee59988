"""Which placed tokens to compute again: chosen for each request, where the policy looks at it.

A look is a pass of its own, over little: the question alone, or the first layer alone. What is chosen is then
computed with the final block, in one pass, layer by layer, and written into the context in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rag_blockcache.assembler import Context
from rag_blockcache.generator import prefill
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan

_MAX_QUERIES = 256  # the end of a long question stands for it
_LAYER_OF_DEVIATION = 1  # the first whose keys and values depend on what stands before


@torch.inference_mode()
def choose_tokens(model: Model, context: Context, plans: Sequence[Plan]) -> None:
    """Let each plan compute again what its policy finds in the assembled context.

    Args:
        model: The model.
        context: Holds the placed slots of all plans, a row each.
        plans: Those whose policy looks at a request get their ``chosen`` positions.
    """
    for row, plan in enumerate(plans):  # a prompt without placed passages has nothing to choose from
        if plan.policy.blend > 0 and plan.candidates().any():
            _choose(plan, _deviation(model, context, row, plan), plan.policy.blend)
    if any(plan.policy.query > 0 and plan.candidates().any() for plan in plans):
        for plan, attention in zip(plans, _attention(model, context, plans), strict=True):
            _choose(plan, attention, plan.policy.query)


def expected_work(model: Model, plan: Plan) -> tuple[int, int]:
    """Return how many tokens a plan will choose, and how many its looks compute; before it is looked at.

    Returns:
        Tokens to be computed again because they will be chosen, and tokens of the passes that choose them; a
        pass through some of the layers counts as that part of its tokens.
    """
    num_candidates = int(plan.candidates().sum())
    if not plan.policy.looks or not num_candidates:
        return 0, 0
    wanted = sum(round(share * plan.num_passage_tokens) for share in (plan.policy.query, plan.policy.blend))
    num_looked = len(plan.unfilled().positions) if plan.policy.query > 0 else 0
    if plan.policy.blend > 0:
        num_looked += plan.num_tokens * (_layer_of_deviation(model) + 1) // model.num_layers
    return min(wanted, num_candidates), num_looked


def _choose(plan: Plan, score: Tensor, share: float) -> None:
    """Add those candidates of a plan that score highest, as many as its share of all passages' tokens."""
    candidates = plan.candidates()
    number = min(round(share * plan.num_passage_tokens), int(candidates.sum()))
    best = score.masked_fill(~candidates, float("-inf")).topk(number).indices
    plan.chosen = torch.cat((plan.chosen, best))


def _attention(model: Model, context: Context, plans: Sequence[Plan]) -> list[Tensor]:
    """Return how much attention the question pays to each slot of its prompt; see ``_QuestionAttention``.

    The question is computed over the blocks as they are. Only the attention of its tokens is looked at; their
    keys and values are written again by the pass that follows.

    Returns:
        ``(num_tokens,)``, float32, on the CPU, for each plan.
    """
    attention = _QuestionAttention(model, context, plans)
    with model.observing(attention.observe):
        prefill(model, context, [plan.unfilled() for plan in plans])
    return [found.cpu() for found in attention.by_row]


class _QuestionAttention:
    """Adds up the attention of each row's question, while a pass goes through the layers.

    Of each head counts what the one token pays that pays most, and the square root of it, so that a slot that
    several heads want a little is worth more than one that a single head holds on to (docs/decisions/0015).
    """

    def __init__(self, model: Model, context: Context, plans: Sequence[Plan]) -> None:
        windowed = [layer.window is not None for layer in model.layers]
        # Windows hide most passages from the question, whatever it would like to see.
        open_layers = [i for i, is_windowed in enumerate(windowed) if not is_windowed or all(windowed)]
        # Without the first third, roots choose better (docs/decisions/0015).
        self._layers = set(open_layers[len(open_layers) // 3 :])
        self._starts, self._questions = context.starts, [plan.question for plan in plans]
        self.by_row = [torch.zeros(plan.num_tokens, device=model.device) for plan in plans]

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Take note of one layer.

        Args:
            layer: Its index.
            query: ``(batch, num_heads, num_queries, head_dim)``; rows end with the prompt's last token.
            key: ``(batch, num_kv_heads, num_slots, head_dim)``.
            scaling: Of their products.
        """
        if layer not in self._layers:
            return
        for row, (start, question) in enumerate(zip(self._starts, self._questions, strict=True)):
            keys = key[row, :, start : start + question.stop]
            behind = key.shape[2] - start - question.stop  # what is computed after the question
            last = query.shape[2] - behind
            first = max(last - min(len(question), _MAX_QUERIES), 0)
            wanted = _wanted(query[row, :, first:last], keys, scaling)
            self.by_row[row][: question.stop] += wanted.to(self.by_row[row].device)


def _wanted(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Return how much the last tokens of a run want each of its slots, in one layer; ``(num_slots,)``."""
    (num_heads, num_queries, head_dim), (num_kv_heads, num_slots, _) = query.shape, key.shape
    grouped = query.reshape(num_kv_heads, num_heads // num_kv_heads * num_queries, head_dim)
    products = (grouped @ key.transpose(1, 2)).float().mul_(scaling)
    products = products.view(num_heads, num_queries, num_slots)
    future = torch.ones(num_queries, num_slots, dtype=torch.bool, device=query.device)
    products.masked_fill_(future.triu(num_slots - num_queries + 1), float("-inf"))
    return products.softmax(dim=-1).amax(dim=1).sqrt().sum(dim=0)


def _deviation(model: Model, context: Context, row: int, plan: Plan) -> Tensor:
    """Return how far placed keys and values of one layer are from those that full attention gives there.

    Returns:
        Squared distances, ``(num_tokens,)``, float32, on the CPU.

    Source:
        High-KV-deviation tokens of CacheBlend, https://arxiv.org/abs/2405.16444
    """
    index = _layer_of_deviation(model)
    keys, values = _states_of_layer(model, index, plan.token_ids)
    start = context.starts[row]
    slots = slice(start, start + plan.num_tokens)
    placed = context.states_of_layer(index)
    found = torch.zeros(plan.num_tokens, device=keys.device)
    for exact, used in zip((keys, values), placed, strict=True):
        found += (exact[0].float() - used[row, :, slots].float()).square().sum(dim=(0, 2))
    return found.cpu()


def _layer_of_deviation(model: Model) -> int:
    return min(_LAYER_OF_DEVIATION, model.num_layers - 1)


def _states_of_layer(model: Model, index: int, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute keys and values of one layer under full attention, and nothing behind them."""
    stop = _StopAt(index)
    try:
        with model.inference():
            model.backbone(
                input_ids=torch.tensor([token_ids], device=model.device),
                position_ids=torch.arange(len(token_ids), device=model.device)[None],
                past_key_values=stop,
                use_cache=True,
            )
    except _Enough:
        pass
    assert stop.states is not None, "every layer shows its states to the cache"
    return stop.states


class _Enough(Exception):  # noqa: N818  # nothing went wrong
    """Ends a forward pass whose rest nobody needs."""


class _StopAt(Cache):
    """A transformers cache that keeps nothing, and ends the pass at one layer."""

    def __init__(self, index: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._index = index
        self.states: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Hand the states of a layer on, or stop there."""
        if layer_idx == self._index:
            self.states = key_states, value_states
            raise _Enough
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before the pass."""
        return 0
