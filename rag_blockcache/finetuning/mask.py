"""What a token of a row sees: the block mask, as a dense tensor or for FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flex_attention_mask

from rag_blockcache.errors import UnsupportedModelError

FLEX = "rag_blockcache_flex"
Sees = Callable[[Any, Any, Tensor, Tensor], Tensor]
Mask = Tensor | BlockMask | dict[str, Tensor | BlockMask]
Kind = Literal["flex", "boolean", "additive"]


def block_mask(batch: Mapping[str, Tensor], block_ids: Tensor, window: int | None) -> Sees:
    """Return the function that tells whether a query sees a key, as FlexAttention calls it.

    A token sees what stands before it in its sample and in no other branch: in a block only its block and
    the stand-ins before it, in text everything but stand-ins.

    Args:
        batch: See ``packing.collate``.
        block_ids: ``(num_tokens,)``, see ``Sample``; none above 0 for full attention.
        window: Number of positions a query sees, its own included; None for all before it.

    Source:
        Block-Attention for Efficient Prefilling, https://arxiv.org/abs/2409.15355
    """
    sample_ids, branch_ids, positions = (
        batch[name][0] for name in ("sample_ids", "branch_ids", "position_ids")
    )

    def sees(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        own_block = block_ids[query].abs() == block_ids[key].abs()
        own_block = own_block | ((block_ids[query] == 0) & (block_ids[key] >= 0))
        own_branch = (branch_ids[key] == 0) | (branch_ids[query] == branch_ids[key])
        seen = (query >= key) & (sample_ids[query] == sample_ids[key]) & own_block & own_branch
        return seen if window is None else seen & (positions[query] - positions[key] < window)

    return sees


class Masks:
    """Makes the masks of rows for one model.

    Args:
        windows: Window of each kind of layer, None for full attention.
        kind: For FlexAttention; or dense, boolean for SDPA and added to scores by eager attention.
        dtype: Of masks that are added.
    """

    def __init__(
        self, windows: Mapping[str, int | None], kind: Kind, dtype: torch.dtype = torch.float32
    ) -> None:
        self._windows = dict(windows)
        self._kind, self._dtype = kind, dtype

    @property
    def is_flex(self) -> bool:
        """Whether the masks are those of FlexAttention."""
        return self._kind == "flex"

    def of(self, batch: Mapping[str, Tensor], *, full: bool = False) -> Mask:
        """Make the mask of a batch of one row.

        Args:
            batch: See ``packing.collate``.
            full: Full attention within each sample, whatever its mode.

        Returns:
            Dense ``(1, 1, num_tokens, num_tokens)``, or a mask of FlexAttention; a mapping from the kind of
            layer to such a mask if layers differ.
        """
        blocks = batch["block_ids"][0]
        blocks = blocks.clamp(max=0) if full else blocks  # nobody sees stand-ins that have no block
        masks = {
            layers: self._build(block_mask(batch, blocks, window), len(blocks), blocks.device)
            for layers, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _build(self, sees: Sees, length: int, device: torch.device) -> Tensor | BlockMask:
        if self._kind == "flex":
            make = _compiled_mask() if device.type == "cuda" else create_block_mask  # else it is dense first
            return make(sees, None, None, length, length, device=device)
        places = torch.arange(length, device=device)
        seen = sees(0, 0, places[:, None], places)[None, None]
        if self._kind == "boolean":
            return seen
        zeros = torch.zeros(seen.shape, dtype=self._dtype, device=device)
        return zeros.masked_fill_(~seen, torch.finfo(self._dtype).min)


def register() -> None:
    """Make FlexAttention of our own known to transformers by ``FLEX``; only models set to it use it."""
    AttentionInterface.register(FLEX, _attend)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


@functools.cache
def _compiled_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask, dynamic=False)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend under a mask; query heads of a group read the same keys and values, nothing is repeated.

    Under autocast, rotary encoding may leave queries and keys in float32 beside values in bfloat16, and
    the kernel wants them alike.
    """
    if dropout or s_aux is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for attention dropout or sinks, which FlexAttention lacks; "
            "train with --attention sdpa"
        )
    capped = None if softcap is None else functools.partial(_cap, softcap)
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    output = attend(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        score_mod=capped,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def _cap(bound: float, score: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Tensor:
    return bound * torch.tanh(score / bound)
