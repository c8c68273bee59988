"""Products of few tokens with the weights of a layer, which a GPU reads once.

How the parts of such a product are added up, see ``layer_kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_blockcache.gpu.attention import num_processors, power_of_two, shared_bytes
from rag_blockcache.gpu.layer_kernels import gated_kernel, linear_kernel


@dataclass(frozen=True)
class _Tiles:
    """How much of a product one program computes at a time, and among how many a sum is split."""

    outputs: int
    inputs: int
    splits: int
    stages: int


def _tiles(
    num_tokens: int,
    sizes: Sequence[int],
    num_inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weights: int,
) -> _Tiles:
    """Choose tiles that keep all processors reading.

    Args:
        num_tokens: Of the pass, filled up.
        sizes: Outputs of each weight.
        num_inputs: Summed over.
        dtype: Of weights.
        device: Where.
        weights: How many a program reads at once.
    """
    inputs = 32 if dtype == torch.float32 else 128 // weights
    inputs = min(inputs, max(16, power_of_two(num_inputs) // 2))
    outputs = next(size for size in (64, 32, 16) if not any(each % size for each in sizes))
    programs, processors = sum(sizes) // outputs, num_processors(device)
    splits = 1
    while (
        weights == 1
        and splits < 8
        and programs * splits < 0.9 * processors
        and num_inputs >= 4 * splits * inputs
    ):
        splits *= 2
    each = (num_tokens + weights * outputs) * inputs * dtype.itemsize
    at_once = 1 if programs * splits <= processors else 2  # programs of a processor
    stages = shared_bytes(device) // at_once // each
    return _Tiles(outputs, inputs, splits, max(2, min(stages - (stages > 3), 5)))


def linear(states: Tensor, *weights: Tensor) -> Tensor:
    """Multiply ``(num_tokens, num_inputs)`` with weights whose outputs stand behind one another.

    Returns:
        Parts to be summed, ``(num_splits, num_tokens, num_outputs)``, float32.
    """
    num_tokens, num_inputs = states.shape
    sizes = [len(weight) for weight in weights]
    block_tokens = power_of_two(num_tokens)
    tiles = _tiles(block_tokens, sizes, num_inputs, states.dtype, states.device, weights=1)
    num_blocks = -(-num_inputs // tiles.inputs)
    parts = states.new_empty((tiles.splits, num_tokens, sum(sizes)), dtype=torch.float32)
    linear_kernel[(sum(sizes) // tiles.outputs, tiles.splits)](
        states,
        weights[0],
        weights[min(1, len(weights) - 1)],
        weights[-1],
        parts,
        num_tokens,
        sizes[0],
        sum(sizes[:2]),
        sum(sizes),
        num_inputs,
        -(-num_blocks // tiles.splits),
        block_tokens=block_tokens,
        block_outputs=tiles.outputs,
        block_inputs=tiles.inputs,
        is_whole=num_inputs % tiles.inputs == 0,
        precision="ieee",
        num_warps=4,
        num_stages=tiles.stages,
    )
    return parts


def gated(states: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(states @ gate.T) * (states @ up.T)``, ``(num_tokens, num_outputs)``."""
    num_tokens, num_inputs = states.shape
    block_tokens = power_of_two(num_tokens)
    tiles = _tiles(block_tokens, [len(gate)], num_inputs, states.dtype, states.device, weights=2)
    output = states.new_empty((num_tokens, len(gate)))
    gated_kernel[(len(gate) // tiles.outputs,)](
        states,
        gate,
        up,
        output,
        num_tokens,
        len(gate),
        num_inputs,
        block_tokens=block_tokens,
        block_outputs=tiles.outputs,
        block_inputs=tiles.inputs,
        is_whole=num_inputs % tiles.inputs == 0,
        precision="ieee",
        num_warps=4,
        num_stages=tiles.stages,
    )
    return output
