"""One request through the stages of the engine, as ``BlockCache`` runs them, with the clock beside it.

Prompts are token ids, so that lengths are exact; everything else that the library does at request time is
here: naming the blocks, looking them up, assembling the context, the pass over the computed slots.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_blockcache.assembler import Context
from rag_blockcache.block_source import BlockSource
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.stopwatch import Clock
from rag_blockcache.evaluation.token_prompts import TokenPrompt
from rag_blockcache.generator import prefill
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.model import Model
from rag_blockcache.plan import Plan
from rag_blockcache.repair import choose_tokens
from rag_blockcache.reuse import Policy
from rag_blockcache.store import TieredStore

_ROOM = 256  # slots kept for the answer, as ``BlockCache.generate`` does by default


@dataclass(frozen=True)
class FirstToken:
    """The first token of an answer, and the time it took.

    Attributes:
        logits: ``(vocab_size,)``; None where only the token is known.
        seconds: From the token ids of the prompt to the chosen token.
        name_seconds: Naming the blocks, and what is to be computed.
        load_seconds: Getting their states from the store.
        assemble_seconds: Allocating the context, turning keys, placing; on a GPU, launching that.
        compute_seconds: The pass over the computed slots, and the look that chose some of them; on a GPU, and
            the wait for all that was launched.
        passes: Positions that each pass through all layers computed, the last of them in the last place.
    """

    logits: Tensor | None
    seconds: float
    name_seconds: float = 0.0
    load_seconds: float = 0.0
    assemble_seconds: float = 0.0
    compute_seconds: float = 0.0
    passes: tuple[Sequence[int], ...] = ()


def block_source(model: Model, store: TieredStore) -> BlockSource:
    """Return blocks of a model from a store, named as the library names them."""
    return BlockSource(model, store, fingerprint=model.fingerprint)


def make_plan(source: BlockSource, prompt: TokenPrompt, policy: Policy) -> Plan:
    """Decide what is placed and what is computed.

    Raises:
        InvalidInputError: If the model cannot reuse blocks in a prompt of this length.
    """
    regime = source.model.regime(prompt.num_tokens)
    if regime is None:
        raise InvalidInputError(
            "the rotary frequencies of this model change with every length beyond its window, so nothing "
            f"can be reused at {prompt.num_tokens} tokens; measure shorter prompts"
        )
    plan = Plan(prompt.segments(), policy, "", regime, is_auto=False, start=0.0)
    for index, segment in enumerate(plan.segments):
        if segment.kind == "passage":
            plan.blocks[index] = source.block(segment.token_ids, regime=regime)
    return plan


def store_blocks(source: BlockSource, prompt: TokenPrompt, policy: Policy, *others: TieredStore) -> None:
    """Encode those blocks of a prompt that are missing, and put them into the source's store and others."""
    plan = make_plan(source, prompt, policy)
    missing = {block.block_id: block for block in plan.blocks.values() if block.block_id not in source.store}
    for batch, seconds in source.encode(list(missing.values()), regime=plan.regime):
        for store in (source.store, *others):
            store.put_many(batch, cost_seconds=seconds)


def assemble(model: Model, plan: Plan, states: Mapping[str, BlockStates]) -> Context:
    """Place the blocks of a plan in a new context."""
    context = Context(model, [plan.num_tokens], room=_ROOM)
    context.place(0, plan.placements(states), plan.num_tokens)
    return context


@torch.inference_mode()
def reused_first_token(source: BlockSource, prompt: TokenPrompt, policy: Policy) -> FirstToken:
    """Take a request from its token ids to its first token, with blocks that are stored.

    On a GPU nothing waits before the token, as in the library: a part is the time of the host, and what the
    device still does then is waited for in the last one.
    """
    model = source.model
    clock = Clock(model.device)
    start = clock()
    plan = make_plan(source, prompt, policy)
    named = time.perf_counter()
    states = source.load(plan)
    loaded = time.perf_counter()
    assert len(states) == len({block.block_id for block in plan.blocks.values()}), "all blocks must be stored"
    context = assemble(model, plan, states)
    assembled = time.perf_counter()
    choose_tokens(model, context, [plan])
    computed = plan.computed()
    logits = prefill(model, context, [computed])[0, -1]
    int(logits.argmax())
    done = clock()
    looks = [plan.unfilled()] if policy.query > 0 else []
    return FirstToken(
        logits,
        seconds=done - start,
        name_seconds=named - start,
        load_seconds=loaded - named,
        assemble_seconds=assembled - loaded,
        compute_seconds=done - assembled,
        passes=tuple(each.positions.tolist() for each in (*looks, computed)),
    )


@torch.inference_mode()
def full_first_token(model: Model, prompt: TokenPrompt) -> FirstToken:
    """Prefill the same token ids with the bare model, as transformers does it."""
    clock = Clock(model.device)
    token_ids = prompt.token_ids
    start = clock()
    input_ids = torch.tensor([token_ids], device=model.device)
    logits = model.network(input_ids=input_ids, use_cache=True, logits_to_keep=1).logits[0, -1]
    int(logits.argmax())
    seconds = clock() - start
    return FirstToken(logits, seconds, compute_seconds=seconds)


class Floor:
    """The final block alone, over a context that is assembled already: no reuse can be sooner.

    Args:
        source: Has all blocks of the prompt.
        prompt: The prompt.
        policy: Reuses blocks as they are.
    """

    def __init__(self, source: BlockSource, prompt: TokenPrompt, policy: Policy) -> None:
        self._model = source.model
        plan = make_plan(source, prompt, policy)
        self._context = assemble(self._model, plan, source.load(plan))
        self._computed = plan.computed()

    @torch.inference_mode()
    def first_token(self) -> FirstToken:
        """Compute the final block, writing over what it wrote the time before."""
        clock = Clock(self._model.device)
        start = clock()
        logits = prefill(self._model, self._context, [self._computed])[0, -1]
        int(logits.argmax())
        seconds = clock() - start
        return FirstToken(logits, seconds, compute_seconds=seconds)
