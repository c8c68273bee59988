"""Where a model's own device keeps the blocks that are used most, and how many bytes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.model import Model
from rag_blockcache.store import DeviceStore

_SHARE = 0.25  # of what is free: contexts and the passes over them take more than blocks save


def device_tier(model: Model, budget_bytes: int | None, *, context_budget_bytes: int) -> DeviceStore | None:
    """Return a store of blocks on the GPU of a model.

    Args:
        model: Loaded, so that what is free now is free for blocks and contexts.
        budget_bytes: Budget of the store; None takes a quarter of what is free.
        context_budget_bytes: What contexts may take that are kept; not counted as free.

    Returns:
        None if the budget is 0, on a CPU, and for a model whose layers lie on several devices, each of which
        needs a part of every block.

    Raises:
        InvalidInputError: If the budget is negative.
    """
    if budget_bytes is not None and budget_bytes < 0:
        raise InvalidInputError(
            f"device_budget_bytes is {budget_bytes}; use 0 to keep no blocks on the device"
        )
    device = model.device
    if budget_bytes == 0 or device.type != "cuda" or {layer.device for layer in model.layers} != {device}:
        return None
    if budget_bytes is None:
        num_free, _ = torch.cuda.mem_get_info(device)
        budget_bytes = int(_SHARE * max(0, num_free - context_budget_bytes))

    def copy(blocks: Sequence[BlockStates]) -> Sequence[BlockStates]:
        from rag_blockcache.gpu.staging import copies

        return copies(blocks, device)

    return DeviceStore(device, copy, budget_bytes)
