"""A model's reuse checked against the model itself, at load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rag_blockcache.assembler import Context
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import UnsupportedModelError
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.kv_states import Placement
from rag_blockcache.layers import probe_tokens
from rag_blockcache.model import Model

_NUM_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


def check_reuse(model: Model) -> None:
    """Compare reuse with the model's own pass where both must agree: one block at the start of a prompt.

    A block at the start, one behind it that saw it, and a final block that sees all of it are plain causal
    attention. A model that ignores the positions or the cache it is given shows here, whatever its
    architecture.

    Raises:
        UnsupportedModelError: If they differ.
    """
    token_ids = probe_tokens(model.vocab_size, min(_NUM_TOKENS, model.max_length))
    half = len(token_ids) // 2
    own = _logits(model, token_ids, [])
    # Alone, and cut in two blocks of which the second was encoded behind the first.
    reused = [_logits(model, token_ids, ends) for ends in ([half], [half // 2, half])]
    differences = [float((logits - own).norm() / own.norm()) for logits in reused]
    allowed = _TOLERANCE.get(model.dtype, 0.05)
    for difference in differences:
        if not difference <= allowed:  # which holds for NaN
            raise UnsupportedModelError(
                f"{type(model.network).__name__} gives other logits over reused states than on its own "
                f"(relative difference {difference:.2g}, {allowed:.2g} is allowed); it cannot be served "
                "exactly"
            )


def _logits(model: Model, token_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the last logits over blocks that end at these tokens, each encoded behind the one before it."""
    context = Context(model, [len(token_ids)])
    before, start = None, 0
    for end in ends:
        [[(_, states)]] = encode_blocks(model, [token_ids[start:end].tolist()], conditioned_on=before)
        context.place(0, [Placement(states, start)], len(token_ids))
        before, start = states, end
    computed = Computed(torch.arange(start, len(token_ids)), token_ids[start:])
    return prefill(model, context, [computed])[0, -1].float()
