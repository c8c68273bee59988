"""Attention over a long context on a CPU, without a copy of it for every query head.

Where query heads share keys and values, transformers copies both once for each query head as soon as there is
a mask. Over a long context that copy, and reading it, costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag_blockcache import bfloat16_attention

NAME = "rag_blockcache"
_CHUNK = 256  # queries; see ``_masked_attention``
_PLAIN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"}

# Called with the index of a layer, its queries, its keys, and the factor of their products.
Observer = Callable[[int, Tensor, Tensor, float], None]
_observer: ContextVar[Observer | None] = ContextVar("rag_blockcache_attention_observer", default=None)


def register() -> None:
    """Make the attention known to transformers by ``NAME``; a model uses it only inside passes of ours."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show the queries and keys of each layer to ``observer``, in passes of this thread inside this block."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as SDPA does in transformers, but let the query heads of a group read the same keys and values.

    Args:
        module: The attention layer.
        query: ``(batch, num_heads, num_queries, head_dim)``.
        key: ``(batch, num_kv_heads, num_slots, head_dim)``.
        value: Same shape.
        attention_mask: ``(batch, 1, num_queries, num_slots)``; None for the causal mask.
        options: What the layer asks for; anything unusual is left to transformers.

    Returns:
        ``(batch, num_queries, num_heads, head_dim)``, and None for the weights.
    """
    observer = _observer.get()
    if observer is not None:
        layer = cast(int, module.layer_idx)
        observer(layer, query, key, options.get("scaling") or query.shape[-1] ** -0.5)
    is_plain = all(
        name in _PLAIN or not value for name, value in options.items() if not isinstance(value, Tensor)
    )
    # On a GPU the kernels that are fast take no groups beside a mask; transformers copies there.
    is_grouped = query.shape[1] > key.shape[1] and query.device.type == "cpu"
    if is_grouped and is_plain and not options.get("dropout"):
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _attention_of_one(query, key, value, attention_mask, options.get("scaling")), None
        if attention_mask is not None:
            is_taken = bfloat16_attention.takes(query, key, attention_mask)
            attend = bfloat16_attention.attend if is_taken else _masked_attention
            return attend(query, key, value, attention_mask, options.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _attention_of_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attend from one token a row: the heads of a group stand as queries of one head, which reads once.

    A kernel that takes query heads one by one reads keys and values as often as there are heads in a group,
    or copies them, and for one token reading is nearly all there is to do.

    Returns:
        ``(batch, 1, num_heads, head_dim)``.
    """
    batch, num_heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return output.reshape(batch, 1, num_heads, head_dim)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """Attend some queries at a time, each time over those slots alone that one of them sees.

    A kernel cannot tell from a mask that whole runs of slots are hidden, as the future is, and what lies
    beyond a window. Of queries that are spread over the context, as repaired tokens are, it is half the work.

    Returns:
        ``(batch, num_queries, num_heads, head_dim)``.
    """
    num_queries = query.shape[2]
    is_cut = mask.dtype == torch.bool and num_queries >= 2 * _CHUNK
    chunk = _CHUNK if is_cut else num_queries
    parts = []
    for first in range(0, num_queries, chunk):
        queries = slice(first, first + chunk)
        slots = bfloat16_attention.run_of_seen(mask[:, :, queries]) if is_cut else slice(0, key.shape[2])
        part = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, queries],
            key[:, :, slots],
            value[:, :, slots],
            attn_mask=mask[:, :, queries, slots],
            scale=scaling,
            enable_gqa=True,
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()
