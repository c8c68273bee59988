"""A model's reuse checked against the model itself, at load."""

from __future__ import annotations

import torch

from rag_blockcache.assembler import Context, Placement
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import UnsupportedModelError
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.layers import probe_tokens
from rag_blockcache.model import Model

_NUM_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


def check_reuse(model: Model) -> None:
    """Compare reuse with the model's own pass where both must agree: one block at the start of a prompt.

    A block at the start, and a final block that sees all of it, is plain causal attention. A model that
    ignores the positions or the cache it is given shows here, whatever its architecture.

    Raises:
        UnsupportedModelError: If they differ.
    """
    token_ids = probe_tokens(model.vocab_size, min(_NUM_TOKENS, model.max_length))
    num_tokens, half = len(token_ids), len(token_ids) // 2
    logits = []
    for num_reused in (0, half):
        context = Context(model, [num_tokens])
        if num_reused:
            [[(_, states)]] = encode_blocks(model, [token_ids[:num_reused].tolist()])
            context.place(0, [Placement(states, 0)], num_tokens)
        computed = Computed(torch.arange(num_reused, num_tokens), token_ids[num_reused:])
        logits.append(prefill(model, context, [computed])[0, -1].float())
    own, reused = logits
    difference = float((reused - own).norm() / own.norm())
    allowed = _TOLERANCE.get(model.dtype, 0.05)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"{type(model.network).__name__} gives other logits over reused states than on its own (relative "
            f"difference {difference:.2g}, {allowed:.2g} is allowed); it cannot be served exactly"
        )
