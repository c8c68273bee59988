"""Decoder layers as Llama has them, in nine kernels each instead of some thirty, for passes over few tokens.

A pass over a question reads each weight once. What stands between the products is little work in many
launches, which together take long beside that reading; here it is done where numbers are loaded or
stored anyway. Nothing is taken from names of classes: layers are run both ways, and fused only if their
numbers are the same but for rounding.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rag_blockcache.gpu.attention import Slots, attend, power_of_two
from rag_blockcache.gpu.layer_kernels import norm_kernel, turn_kernel
from rag_blockcache.gpu.products import gated, linear

logger = logging.getLogger(__name__)

MAX_TOKENS = 64  # with more, products are a matter of computing, and libraries are better at it
_ALIGNMENT = 16  # all sizes are multiples of it
_PROBE_SIZE = 2**-6  # of hidden states in a probe: small beside what a layer adds to them
_ROUNDINGS = 4  # that two ways through a layer may be apart: twice what tiny Llamas are
_DECODER = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

OrdinaryLayer = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor]], Tensor]


class FusedLayers:
    """The layers of one network; weights are read where they are.

    Args:
        decoder: All of the network but its head; see ``fused_layers_of``.
        head: Makes logits.
        norm: Before the head.
        layers: In order.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, norm: _Norm, layers: Sequence[_Layer]) -> None:
        self._decoder, self._head, self._norm, self._layers = decoder, head, norm, layers

    def forward(self, token_ids: Tensor, positions: Tensor, at: Slots) -> Tensor:
        """Compute slots of a context.

        Args:
            token_ids: ``(1, num_tokens)``.
            positions: Same shape.
            at: Where the tokens stand.

        Returns:
            Logits of the last token, ``(1, 1, vocab_size)``.
        """
        hidden: Tensor = self._decoder.embed_tokens(token_ids)[0]  # type: ignore[operator]
        cos, sin = self._angles(hidden, positions)
        given: Tensor | None = None
        for index, layer in enumerate(self._layers):
            hidden, given = layer.run(hidden, given, cos, sin, at, index)
        return self._logits(hidden, given)

    def agrees(
        self,
        whole: Callable[[], Tensor],
        ordinary: OrdinaryLayer,
        token_ids: Tensor,
        positions: Tensor,
        at: Slots,
    ) -> bool:
        """Return whether the network gives the same but for rounding: around its layers, and in each of them.

        Layers are compared one by one, since in half precision rounding adds up over many of them.

        Args:
            whole: Runs the network over the same tokens.
            ordinary: Runs a layer of the network over hidden states ``(1, num_tokens, width)``, with cosines
                and sines, and writes to the same slots.
            token_ids: ``(1, num_tokens)``.
            positions: Same shape.
            at: Slots, which are written to.
        """
        weight = self._layers[0].input_norm.weight
        limit = max(_ROUNDINGS * torch.finfo(weight.dtype).eps, 1e-4)
        embedded: Tensor = self._decoder.embed_tokens(token_ids)[0]  # type: ignore[operator]
        cos, sin = self._angles(embedded, positions)
        if cos.shape[-1] != self._layers[0].head_dim:  # not all dimensions are turned
            return False
        shown: list[Tensor] = []
        with self._skipped(shown):
            expected = whole().float()
        found = self._logits(embedded, None).float()
        if (found - expected).norm() > limit * expected.norm():
            logger.debug("what stands around the layers is not as Llama's is")
            return False
        alike = [torch.equal(one[0], other) for one, other in zip(shown, cycle((embedded, cos, sin)))]
        if not all(alike) or len(alike) != 3 * len(self._layers):
            return False
        generator = torch.Generator(weight.device).manual_seed(0)
        noise = torch.randn(embedded.shape, generator=generator, device=weight.device, dtype=torch.float32)
        hidden = (noise * _PROBE_SIZE).to(weight.dtype)
        for index, layer in enumerate(self._layers):
            expected = ordinary(layer.module, hidden[None], (cos[None], sin[None]))[0].float()
            last, given = layer.run(hidden, None, cos, sin, at, index)
            found = last.float() + given.sum(0)
            allowed = limit * ((expected - hidden).norm() + hidden.float().norm())
            apart = float((found - expected).norm() / allowed)
            if not apart <= 1:
                logger.debug("layer %d is not as Llama's are: %.3g times what rounding may do", index, apart)
                return False
        return True

    @contextmanager
    def _skipped(self, shown: list[Tensor]) -> Iterator[None]:
        """Let layers give what they are given, inside this block and in this thread only.

        Args:
            shown: Takes what each layer is given: hidden states, cosines, sines.
        """
        thread = threading.get_ident()

        def skip(module: nn.Module, hidden: Tensor, *more: object, **options: Any) -> Tensor:
            if threading.get_ident() != thread:  # a thread of the user's runs the network itself meanwhile
                return type(module).forward(module, hidden, *more, **options)  # type: ignore[no-any-return]
            shown.extend((hidden, *options["position_embeddings"]))
            return hidden

        try:
            for layer in self._layers:
                layer.module.__dict__["forward"] = partial(skip, layer.module)
            yield
        finally:
            for layer in self._layers:
                layer.module.__dict__.pop("forward", None)

    def _logits(self, hidden: Tensor, given: Tensor | None) -> Tensor:
        _, normed = self._norm.of_sum(hidden, given)
        logits: Tensor = self._head(normed[None, -1:])
        return logits

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._decoder.rotary_emb(hidden[None], positions)  # type: ignore[operator]
        return cos[0].contiguous(), sin[0].contiguous()


class _Norm:
    """An RMS norm of a sum."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._module, self._eps = module, eps

    @property
    def weight(self) -> Tensor:
        return self._module.weight  # type: ignore[return-value]

    def of_sum(self, hidden: Tensor, parts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``hidden + parts.sum(0)``, and its norm; both ``(num_tokens, width)``."""
        num_tokens, width = hidden.shape
        normed = torch.empty_like(hidden)
        summed = hidden if parts is None else torch.empty_like(hidden)
        norm_kernel[(num_tokens,)](
            hidden,
            hidden if parts is None else parts,
            self.weight,
            summed,
            normed,
            width,
            num_tokens * width,
            self._eps,
            num_parts=0 if parts is None else len(parts),
            block_width=power_of_two(width),
            num_warps=8 if width > 1024 else 4,
        )
        return summed, normed


class _Layer:
    """One decoder layer.

    Attributes:
        module: The layer of the network.
        input_norm: Its first norm.
        head_dim: Size of a head.
    """

    def __init__(self, module: nn.Module, norms: Sequence[_Norm], num_kv_heads: int, head_dim: int) -> None:
        self.module = module
        attention, mlp = module.self_attn, module.mlp
        self.input_norm, self._second_norm = norms
        self._projections: list[nn.Linear] = [getattr(attention, name) for name in _ATTENTION[:3]]
        self._out: nn.Linear = attention.o_proj  # type: ignore[assignment,union-attr]
        self._gate, self._up, self._down = (getattr(mlp, name) for name in _MLP)
        self._num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self._scaling = float(getattr(attention, "scaling", head_dim**-0.5))

    def run(
        self, hidden: Tensor, given: Tensor | None, cos: Tensor, sin: Tensor, at: Slots, index: int
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states before the last product of the layer, and its parts, still to be added."""
        hidden, normed = self.input_norm.of_sum(hidden, given)
        query = self._turned(
            linear(normed, *(each.weight for each in self._projections)), cos, sin, at, index
        )
        attended = attend(query, at, index, num_kv_heads=self._num_kv_heads, scaling=self._scaling)
        hidden, normed = self._second_norm.of_sum(hidden, linear(attended.flatten(2)[0], self._out.weight))
        return hidden, linear(gated(normed, self._gate.weight, self._up.weight), self._down.weight)

    def _turned(self, parts: Tensor, cos: Tensor, sin: Tensor, at: Slots, index: int) -> Tensor:
        """Write keys and values; return queries at their positions, ``(1, heads, tokens, head_dim)``."""
        num_parts, num_tokens, width = parts.shape
        num_kv_heads, head_dim = self._num_kv_heads, self.head_dim
        num_heads = width // head_dim - 2 * num_kv_heads
        query = torch.empty((num_tokens, num_heads, head_dim), dtype=cos.dtype, device=cos.device)
        biases = [each.bias for each in self._projections]
        turn_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
            parts,
            *(query if bias is None else bias for bias in biases),
            cos,
            sin,
            query,
            at.table,
            at.slots,
            index,
            num_tokens,
            num_heads,
            num_kv_heads,
            num_parts=num_parts,
            has_bias=biases[0] is not None,
            head_dim=head_dim,
            block_half=power_of_two(head_dim // 2),
            num_warps=1,
        )
        return query.transpose(0, 1)[None]


def fused_layers_of(
    network: nn.Module, norms: Mapping[nn.Module, float], *, num_kv_heads: int, head_dim: int
) -> FusedLayers | None:
    """Return the layers of a network that consists of what Llama consists of; ``agrees`` knows the rest.

    Args:
        network: The network.
        norms: Its RMS norms; see ``FusedNorms``.
        num_kv_heads: Key-value heads of each layer.
        head_dim: Size of each head.
    """
    decoder, head = getattr(network, "model", None), getattr(network, "lm_head", None)
    if not isinstance(decoder, nn.Module) or not isinstance(head, nn.Module) or not _has(decoder, _DECODER):
        return None
    modules = list(decoder.layers)  # type: ignore[arg-type]
    if not all(_is_layer(module) for module in modules) or head_dim % 2:
        return None
    found = [
        module for layer in modules for module in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    if not all(module in norms for module in (*found, decoder.norm)):
        return None
    first, second, last = found[::2], found[1::2], decoder.norm
    layers = [
        _Layer(layer, [_Norm(norm, norms[norm]) for norm in pair], num_kv_heads, head_dim)
        for layer, *pair in zip(modules, first, second, strict=True)
    ]
    return FusedLayers(decoder, head, _Norm(last, norms[last]), layers)  # type: ignore[arg-type,index]


def _has(module: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a module consists of these, and has no weights of its own."""
    return set(module._modules) == set(names) and not module._parameters


def _is_layer(layer: nn.Module) -> bool:
    if not _has(layer, _LAYER):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return False
    if not _has(attention, _ATTENTION) or not _has(mlp, (*_MLP, "act_fn")) or not _is_silu(mlp.act_fn):
        return False
    linears = [getattr(attention, name) for name in _ATTENTION] + [getattr(mlp, name) for name in _MLP]
    if not all(type(each) is nn.Linear and each.weight.is_contiguous() for each in linears):
        return False
    is_biased = [each.bias is not None for each in linears]
    return is_biased in ([False] * 7, [True] * 3 + [False] * 4) and not any(
        size % _ALIGNMENT for each in linears for size in each.weight.shape
    )


def _is_silu(function: object) -> bool:
    if not callable(function):
        return False
    shown = torch.linspace(-6, 6, 49)
    try:
        found = function(shown)
    except Exception:  # no function of one tensor
        return False
    return isinstance(found, Tensor) and torch.allclose(found, functional.silu(shown), atol=1e-5)
