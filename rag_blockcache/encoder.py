"""Blocks in, KV states out: batched prefill of passages, none of which sees another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rag_blockcache.kv_states import KVStates, empty
from rag_blockcache.model import Model
from rag_blockcache.rotary import Angles, rotate_keys, unrotate_keys

_MAX_BATCH_TOKENS = {"cpu": 2048}  # past this a CPU gains nothing (docs/decisions/0006)
_MIN_BATCH_TOKENS = 256
_PADDING_SHARE = 0.04  # of a batch
_MEMORY_SHARE = 0.2  # of what is free, for the activations of one batch


@torch.inference_mode()
def encode_blocks(
    model: Model,
    blocks: Sequence[Sequence[int]],
    *,
    conditioned_on: KVStates | None = None,
    regime: str = "",
    batch_tokens: int | None = None,
) -> Iterator[list[tuple[int, KVStates]]]:
    """Compute the KV states of blocks, in batches of similar length.

    Blocks stand in rows of their own, padded at the end. No token attends to one after it, so padding changes
    nothing, and where blocks see themselves alone the fast causal kernel needs no mask.

    Args:
        model: The model.
        blocks: Token ids of each block, none empty.
        conditioned_on: States that every block attends to, as if it followed them; None for the paper's
            blocks, which see themselves alone.
        regime: See ``Model.regime``.
        batch_tokens: Tokens in a batch, padding included; None chooses by memory.

    Yields:
        For each batch, the index of each of its blocks with its position-free states.
    """
    for batch in _batches([len(block) for block in blocks], batch_tokens or batch_size_tokens(model)):
        yield list(
            zip(batch, _encode_batch(model, [blocks[i] for i in batch], conditioned_on, regime), strict=True)
        )


def batch_size_tokens(model: Model) -> int:
    """Choose how many tokens to encode at once, by the memory that is free."""
    hidden = model.config.hidden_size
    width = max(3 * getattr(model.config, "intermediate_size", 4 * hidden), 8 * hidden)
    bytes_per_token = width * model.dtype.itemsize + 2 * model.kv_bytes_per_token
    affordable = _free_bytes(model.device) * _MEMORY_SHARE / bytes_per_token
    most = _MAX_BATCH_TOKENS.get(model.device.type, 65536)
    return int(max(_MIN_BATCH_TOKENS, min(affordable, most)))


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group indices of blocks of similar length, longest first, so that little of a batch is padding.

    A batch ends when it would pass ``batch_tokens``, or would be padded by more than ``_PADDING_SHARE`` and
    is large enough already to keep the cores busy.
    """
    batch: list[int] = []
    num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = lengths[batch[0]] * (len(batch) + 1) if batch else lengths[index]
        is_wasteful = padded * (1 - _PADDING_SHARE) > num_tokens + lengths[index]
        if batch and (padded > batch_tokens or (is_wasteful and 4 * num_tokens > batch_tokens)):
            yield batch
            batch, num_tokens = [], 0
        batch.append(index)
        num_tokens += lengths[index]
    if batch:
        yield batch


def _encode_batch(
    model: Model, blocks: Sequence[Sequence[int]], conditioned_on: KVStates | None, regime: str
) -> Iterator[KVStates]:
    lengths = [len(block) for block in blocks]
    start = 0 if conditioned_on is None else conditioned_on.num_tokens
    shown = model.regime_position(regime)
    width = max(lengths) + (shown is not None)
    token_ids = torch.zeros((len(blocks), width), dtype=torch.long)
    for row, block in enumerate(blocks):
        token_ids[row, : len(block)] = torch.tensor(block)
    positions = torch.arange(start, start + width)
    if shown is not None:
        positions[-1] = shown  # one more token at the end of each row shows the regime to the rotary module
    total_length = int(positions.max()) + 1
    states = _Recorder(model, len(blocks), positions.to(model.device), total_length, conditioned_on)
    with model.inference():
        model.backbone(
            input_ids=token_ids.to(model.device),
            position_ids=positions.expand(len(blocks), -1).to(model.device),
            past_key_values=states,
            use_cache=True,
        )
    for row, length in enumerate(lengths):
        yield KVStates(
            states.keys[:, row, :, :length].contiguous(), states.values[:, row, :, :length].contiguous()
        )


class _Recorder(Cache):
    """A transformers cache that keeps what a pass computes, position-free, and shows what was before."""

    def __init__(
        self, model: Model, num_rows: int, positions: Tensor, total_length: int, before: KVStates | None
    ) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._model, self._positions, self._total_length = model, positions, total_length
        self._before = before
        self._angles: dict[Any, Angles] = {}
        shape = (model.num_layers, num_rows, model.num_kv_heads, len(positions), model.head_dim)
        self.keys, self.values = (empty(shape, model.dtype, model.device) for _ in range(2))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens stand before the pass."""
        return 0 if self._before is None else self._before.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length of the keys that ``update`` returns, and their offset."""
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Record the states of one layer and return all that its queries may attend to."""
        layer = self._model.layers[layer_idx]
        if layer.rotary is None:
            self.keys[layer_idx] = key_states
        else:
            angles = self._angles_of(layer.rotary, self._positions.to(key_states.device), key_states.dtype)
            self.keys[layer_idx] = unrotate_keys(key_states, angles, interleaved=layer.rotary.interleaved)
        self.values[layer_idx] = value_states
        if self._before is None:
            return key_states, value_states
        keys, values = self._before.keys[layer_idx], self._before.values[layer_idx]
        if layer.rotary is not None:
            places = torch.arange(keys.shape[-2], device=self._positions.device)
            angles = self._angles_of(layer.rotary, places, torch.float32).to(keys.device)
            keys = rotate_keys(keys, angles, interleaved=layer.rotary.interleaved)
        return tuple(
            torch.cat((before.to(states.device).expand(len(states), -1, -1, -1), states), dim=-2)
            for before, states in ((keys, key_states), (values, value_states))
        )

    def _angles_of(self, rotary: Any, positions: Tensor, dtype: torch.dtype) -> Angles:
        key = (rotary, int(positions[0]), len(positions), dtype, positions.device)
        if key not in self._angles:
            self._angles[key] = rotary.angles(positions, total_length=self._total_length, dtype=dtype)
        return self._angles[key]
