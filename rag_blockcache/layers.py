"""What each layer of a model keeps, and how it encodes positions: found by a probe, or refused.

Nothing here lists architectures. What a layer keeps is read from the model's own description of its cache.
How it encodes positions is measured: the same tokens are encoded at two places, and the way of turning keys
back under which both agree is the layer's. Where none agrees, the model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rag_blockcache.errors import UnsupportedModelError
from rag_blockcache.rotary import Angles, unrotate_keys

_PROBE_TOKENS, _PROBE_OFFSET = 16, 21
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Rotary:
    """One source of rotary angles in a model, and how a layer applies it.

    Attributes:
        module: The model's own rotary module, called as the model calls it.
        layer_type: Passed to modules that serve several kinds of layers (Gemma 3); None otherwise.
        interleaved: See ``rotary.pairs``.
    """

    module: nn.Module
    layer_type: str | None
    interleaved: bool

    def angles(self, positions: Tensor, *, total_length: int, dtype: torch.dtype = torch.float32) -> Angles:
        """Return the angles at ``positions`` in a prompt of ``total_length`` tokens.

        The length matters to variants that choose their frequencies by it (longrope): one more position,
        at the end of the prompt, shows it to the module and is dropped again.

        Args:
            positions: ``(num_tokens,)``.
            total_length: Tokens in the whole prompt.
            dtype: What the model would compute them in; they come back in float32, rounded to it.
        """
        shown = torch.cat((positions, positions.new_tensor([total_length - 1])))[None]
        extra = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.module(torch.empty(1, device=positions.device, dtype=dtype), shown, **extra)
        return Angles(_one_of_each_pair(cos[0, :-1].float()), _one_of_each_pair(sin[0, :-1].float()))


@dataclass(frozen=True)
class Layer:
    """What one decoder layer keeps.

    Attributes:
        layer_type: ``full_attention`` or ``sliding_attention``.
        window: Number of tokens a query sees, itself included; None for all before it.
        rotary: How its keys carry positions; None if they carry none (NoPE layers).
        device: Where its states live.
        num_kv_heads: Key-value heads.
        head_dim: Size of a head.
    """

    layer_type: str
    window: int | None
    rotary: Rotary | None
    device: torch.device
    num_kv_heads: int
    head_dim: int


class _Tap(Cache):
    """A transformers cache that hands keys and values on, and remembers what passed."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Remember what a layer would cache."""
        if layer_idx in self.keys:
            raise UnsupportedModelError(
                f"layer {layer_idx} caches keys more than once in a pass; it cannot be served"
            )
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before what passes."""
        return 0


@torch.inference_mode()
def find_layers(network: PreTrainedModel) -> tuple[Layer, ...]:
    """Find what each layer of a model keeps and how it encodes positions.

    Raises:
        UnsupportedModelError: If blocks of this model could not be reused exactly; the message says why.
    """
    name, config = type(network).__name__, network.config.get_text_config(decoder=True)
    if network.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UnsupportedModelError(
            f"{name} has no head that makes logits; load it as a causal language model (AutoModelForCausalLM)"
        )
    kept = _kept_by_layer(name, config)
    sources = list(_rotary_sources(network))
    if not sources:
        raise UnsupportedModelError(
            f"{name} has no rotary positions (learned or ALiBi positions are tied to their place); "
            "use a model with rotary position embeddings"
        )
    num_tokens = min(_PROBE_TOKENS, config.max_position_embeddings // 2)
    near = torch.arange(num_tokens)
    far = near + min(_PROBE_OFFSET, config.max_position_embeddings - num_tokens)
    tap = _probe(network, torch.stack((near, far)))
    _check_shapes(tap, len(kept), name)
    layers = []
    for index, (layer_type, window) in enumerate(kept):
        keys = tap.keys[index]
        where = f"layer {index} of {name}"
        _check_values(tap.values[index], where)
        rotary = _rotary_of_layer(keys, near, far, sources, where)
        layers.append(Layer(layer_type, window, rotary, keys.device, keys.shape[1], keys.shape[3]))
    if all(layer.rotary is None for layer in layers):
        raise UnsupportedModelError(
            f"the keys of {name} carry no position (ALiBi, or none at all), so blocks cannot be placed; "
            "use a model with rotary position embeddings"
        )
    return tuple(layers)


def probe_tokens(vocab_size: int, num_tokens: int) -> Tensor:
    """Return token ids to probe a model with, ``(num_tokens,)``: spread over the vocabulary, and fixed."""
    return (torch.arange(num_tokens) * 7919 + 13) % vocab_size


def _probe(network: PreTrainedModel, positions: Tensor) -> _Tap:
    """Encode one block at the positions of each row."""
    tap = _Tap()
    embedding = cast(Tensor, network.get_input_embeddings().weight)
    token_ids = probe_tokens(embedding.shape[0], positions.shape[1]).expand(len(positions), -1)
    backbone = cast(nn.Module, network.get_decoder())  # type: ignore[no-untyped-call]
    try:
        backbone(
            input_ids=token_ids.to(embedding.device),
            position_ids=positions.to(embedding.device),
            past_key_values=tap,
            use_cache=True,
        )
    except (TypeError, AttributeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(network).__name__} cannot run over a cache of plain keys and values: {error}"
        ) from error
    return tap


def _kept_by_layer(name: str, config: Any) -> list[tuple[str, int | None]]:
    """Return layer type and window of each layer, or refuse a model that keeps something else."""
    try:
        described = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{name} does not describe what its layers cache ({error})") from error
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(described)
    kept: list[tuple[str, int | None]] = []
    for index, (layer, layer_type) in enumerate(zip(described, types, strict=True)):
        if type(layer) is DynamicLayer:
            kept.append(("full_attention", None))
        elif type(layer) is DynamicSlidingWindowLayer and layer_type == "sliding_attention":
            kept.append(("sliding_attention", int(layer.sliding_window)))
        else:
            raise UnsupportedModelError(
                f"layer {index} of {name} keeps {type(layer).__name__} ({layer_type}) instead of plain keys "
                "and values; state-space, linear, chunked and compressed attention cannot be reused by blocks"
            )
    return kept


def _check_shapes(tap: _Tap, num_layers: int, name: str) -> None:
    if sorted(tap.keys) != list(range(num_layers)):
        raise UnsupportedModelError(
            f"{name} has {num_layers} layers, but {len(tap.keys)} of them cache keys and values; "
            "models that share states between layers cannot be served"
        )
    shapes = {tuple(states.shape) for states in (*tap.keys.values(), *tap.values.values())}
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        raise UnsupportedModelError(
            f"keys and values of {name} differ in shape ({sorted(shapes)[:2]}), as under multi-head latent "
            "attention; only layers that keep plain keys and values of one shape can be served"
        )


def _check_values(values: Tensor, where: str) -> None:
    """Refuse a layer whose values differ between two places of one block."""
    difference = _distance(values[0].float(), values[1].float())
    if not difference <= _TOLERANCE.get(values.dtype, 0.1):
        raise UnsupportedModelError(
            f"{where} puts positions into its values: those of the same block at two places differ by "
            f"{difference:.2g}; such blocks cannot be moved"
        )


def _rotary_sources(network: nn.Module) -> Iterator[Rotary]:
    """Yield every way in which a model could turn its keys."""
    for module in network.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        tables = [n for n in names if n.endswith("inv_freq") and not n.endswith("original_inv_freq")]
        takes_type = "layer_type" in inspect.signature(module.forward).parameters
        for table in tables:
            for interleaved in (False, True):
                yield Rotary(module, table.removesuffix("_inv_freq") if takes_type else None, interleaved)


def _rotary_of_layer(
    keys: Tensor, near: Tensor, far: Tensor, sources: Sequence[Rotary], where: str
) -> Rotary | None:
    """Return the way of turning keys back under which a block is the same at two places.

    Args:
        keys: Of one block at two places, ``(2, num_kv_heads, num_tokens, head_dim)``.
        near: Positions of the first place, ``(num_tokens,)``.
        far: Positions of the second.
        sources: What to try, beside leaving the keys as they are.
        where: For the error.
    """
    tolerance = _TOLERANCE.get(keys.dtype, 0.1)
    total_length = int(far[-1]) + 1
    errors: list[tuple[float, Rotary | None]] = [(_distance(keys[0].float(), keys[1].float()), None)]
    for rotary in sources:
        try:
            angles = [
                rotary.angles(at.to(keys.device), total_length=total_length, dtype=keys.dtype)
                for at in (near, far)
            ]
        except (TypeError, ValueError, IndexError, RuntimeError):
            continue  # not of the text decoder: it takes other arguments (the vision part of a model, say)
        if 2 * angles[0].cos.shape[-1] <= keys.shape[-1]:
            turned = (
                unrotate_keys(row.float(), angle, interleaved=rotary.interleaved)
                for row, angle in zip(keys, angles, strict=True)
            )
            errors.append((_distance(*turned), rotary))
    error, best = min(errors, key=lambda pair: pair[0])
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{where} encodes positions in a way that is not known: the same block at two places differs by "
            f"{error:.2g} after re-encoding, {tolerance:.2g} is allowed; answers would be silently wrong"
        )
    return best


def _distance(one: Tensor, other: Tensor) -> float:
    scale = other.norm()
    return float((one - other).norm() / scale) if scale > 0 else 0.0


def _one_of_each_pair(table: Tensor) -> Tensor:
    """Drop the copies from a table with an entry a dimension: ``(num_tokens, rotary_dim // 2)``."""
    half = table.shape[-1] // 2
    if torch.equal(table[..., :half], table[..., half:]):
        return table[..., :half].contiguous()
    if torch.equal(table[..., 0::2], table[..., 1::2]):
        return table[..., 0::2].contiguous()
    return table
