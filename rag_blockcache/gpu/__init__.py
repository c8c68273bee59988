"""The way to the first token on an NVIDIA GPU: placing in one launch, one read of the context, CUDA graphs.

Nothing here changes a result beyond rounding. Where there is no GPU, no Triton, or a model that it does not
fit, the ordinary way is taken: that of ``assembler`` and of transformers.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from rag_blockcache.model import Model


class LayeredStates(Protocol):
    """A context, as far as a pass needs to know it."""

    def states_of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each ``(1, num_kv_heads, num_slots, head_dim)``."""


@functools.cache
def has_kernels() -> bool:
    """Return whether our kernels can run: torch finds a CUDA device, and Triton is installed with it."""
    return (
        torch.version.hip is None
        and torch.cuda.is_available()
        and importlib.util.find_spec("triton") is not None
    )


def run_pass(
    model: Model, context: LayeredStates, token_ids: Tensor, positions: Tensor, num_logits: int
) -> Tensor | None:
    """Compute slots of a context of one prompt, whose positions are its slots.

    Args:
        model: The model.
        context: Has room for all slots up to the last computed one.
        token_ids: ``(num_tokens,)``, on any device.
        positions: Ascending, same shape, on the CPU.
        num_logits: For how many of the last tokens logits are wanted.

    Returns:
        Logits ``(1, num_logits, vocab_size)``; None if the pass must go the ordinary way.
    """
    if not model.cuda_graphs or model.device.type != "cuda" or not has_kernels():
        return None
    from rag_blockcache.gpu.passes import passes_of  # Triton is imported where it is used

    return passes_of(model).run(model, context, token_ids, positions, num_logits)
