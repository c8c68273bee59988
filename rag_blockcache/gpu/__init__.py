"""The way to the first token on an NVIDIA GPU: placing in one launch, one read of the context, CUDA graphs.

Nothing here changes a result beyond rounding. Where there is no GPU, no Triton, or a model that it does not
fit, the ordinary way is taken: that of ``assembler`` and of transformers.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from rag_blockcache.kv_states import KVStates, Placement
from rag_blockcache.model import Model
from rag_blockcache.rotary import Angles

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LayeredStates(Protocol):
    """A context, as far as a pass needs to know it."""

    def states_of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each ``(1, num_kv_heads, num_slots, head_dim)``."""


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


def place_blocks(
    placements: Sequence[Placement],
    keys: Tensor,
    values: Tensor,
    angles: Angles | None,
    *,
    first_slot: int,
    interleaved: bool,
) -> bool:
    """Write blocks into one row of a context, keys turned to their positions.

    Args:
        placements: Where blocks go, with the states of the layers that are filled, anywhere.
        keys: Where keys go, ``(num_layers, num_kv_heads, num_slots, head_dim)``; slots of a head stand one
            behind the other.
        values: Where values go; same shape and strides.
        angles: Of all positions from 0 on; None leaves keys as they are.
        first_slot: Of the prompt, in the context.
        interleaved: See ``rotary.pairs``.

    Returns:
        Whether it was done; otherwise nothing was.
    """
    if not keys.is_cuda or keys.dtype not in DTYPES or not has_kernels():
        return False
    from rag_blockcache.gpu.placing import place

    with torch.cuda.device(keys.device):
        return place(placements, keys, values, angles, first_slot=first_slot, interleaved=interleaved)


@functools.cache
def has_kernels() -> bool:
    """Return whether our kernels can run: there is a CUDA device, and Triton can compile for it."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        _try()
    except Exception as error:  # of Triton, of the compiler that it calls, of the driver
        logger.warning("the kernels of rag_blockcache do not run here, slower ways are taken: %s", error)
        return False
    return True


def _try() -> None:
    """Place one token, and see that it came."""
    from rag_blockcache.gpu.placing import place

    ones = torch.ones((1, 1, 1, 16), device="cuda")
    keys, values = torch.zeros_like(ones), torch.zeros_like(ones)
    place([Placement(KVStates(ones, ones), 0)], keys, values, None, first_slot=0, interleaved=False)
    if not torch.equal(keys, ones):
        raise RuntimeError("a kernel that was compiled did not write what it should")
