"""Position re-encoding: rotary-encoded keys turned back to no position, and on to a new one.

Pure functions. Rotary encoding turns each pair of key dimensions by an angle linear in the position, and
some variants (YaRN, longrope) also stretch it by a constant. Angles come from the model's own rotary module
(see ``model``), so every way of choosing frequencies is covered without knowing any of them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """Cosine and sine of every pair of dimensions at every position, stretched as the model does.

    Attributes:
        cos: ``(num_tokens, rotary_dim // 2)``, float32.
        sin: Same shape and dtype.
    """

    cos: Tensor
    sin: Tensor

    def at(self, start: int, stop: int) -> Angles:
        """Return the angles of the positions from ``start`` to before ``stop``, as views."""
        return Angles(self.cos[start:stop], self.sin[start:stop])

    def to(self, device: torch.device) -> Angles:
        """Return the angles on ``device``."""
        return Angles(self.cos.to(device), self.sin.to(device))


def pairs(keys: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return the two halves of every pair of dimensions that is turned, as views.

    Args:
        keys: ``(..., head_dim)``; only the first ``rotary_dim`` dimensions are turned.
        rotary_dim: Number of dimensions that carry a position.
        interleaved: Whether a pair is (0, 1), (2, 3), … as in GPT-J, or (0, half), (1, half + 1), … as
            in Llama.

    Returns:
        Two views ``(..., rotary_dim // 2)``.
    """
    if interleaved:
        return keys[..., 0:rotary_dim:2], keys[..., 1:rotary_dim:2]
    half = rotary_dim // 2
    return keys[..., :half], keys[..., half:rotary_dim]


def rotate_keys(
    keys: Tensor, angles: Angles, *, interleaved: bool = False, out: Tensor | None = None
) -> Tensor:
    """Give position-free keys their positions.

    Args:
        keys: Position-free keys, ``(..., num_tokens, head_dim)``.
        angles: Of the positions, one row a token; dimensions that they do not cover stay as they are.
        interleaved: See ``pairs``.
        out: Where to write, shaped as ``keys``; a new tensor if None.

    Returns:
        The keys at their positions, in the dtype of ``keys``; the turn itself is done in float32.

    Source:
        RoFormer, section 3.2, https://arxiv.org/abs/2104.09864
    """
    rotary_dim = 2 * angles.cos.shape[-1]
    wide = keys.float()
    # Whole rows are turned together as far as it goes: operations on halves of rows take longer.
    stretch = angles.cos.new_ones((*angles.cos.shape[:-1], keys.shape[-1]))
    for half in pairs(stretch, rotary_dim, interleaved):
        half.copy_(angles.cos)
    turned = wide * stretch
    first, second = pairs(wide, rotary_dim, interleaved)
    first_turned, second_turned = pairs(turned, rotary_dim, interleaved)
    first_turned.addcmul_(second, angles.sin, value=-1)
    second_turned.addcmul_(first, angles.sin)
    return turned.to(keys.dtype) if out is None else out.copy_(turned)


def unrotate_keys(keys: Tensor, angles: Angles, *, interleaved: bool = False) -> Tensor:
    """Take the positions out of rotary-encoded keys: the inverse of ``rotate_keys``.

    Dividing by ``cos² + sin²`` undoes both the stretch of YaRN and longrope and the rounding of cosines and
    sines in a low-precision model, so pass the angles exactly as the model used them.

    Args:
        keys: Keys with positions, ``(..., num_tokens, head_dim)``.
        angles: Of those positions, one row a token.
        interleaved: See ``pairs``.

    Returns:
        Position-free keys in the dtype of ``keys``; computed in float32.
    """
    stretch = angles.cos.square() + angles.sin.square()
    return rotate_keys(keys, Angles(angles.cos / stretch, -angles.sin / stretch), interleaved=interleaved)
