"""What we need to know of a transformers model; loads it, and refuses what cannot be served exactly.

Nothing here lists architectures. What each layer keeps is read from the model's own cache description, and how
it encodes positions is found by a probe: the same tokens are encoded at two places, and the way of turning keys
back under which both agree is the layer's. Where none agrees, the model is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rag_blockcache.errors import InvalidInputError, ModelNotFoundError, UnsupportedModelError
from rag_blockcache.rotary import Angles, unrotate_keys

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of the KV states; a new one makes every stored block a miss
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

        The length matters to variants that choose their frequencies by it (longrope): one more position, at
        the end of the prompt, shows it to the module and is dropped again.

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
    """

    layer_type: str
    window: int | None
    rotary: Rotary | None
    device: torch.device


class Model:
    """A causal language model of transformers, as the other stages see it.

    The model is used as it is: never copied, never patched. Its weights must not change while it is in use.

    Args:
        network: A causal language model with rotary positions.
        tokenizer: Its tokenizer.

    Attributes:
        layers: What each layer keeps, in order.
        num_kv_heads: Key-value heads a layer.
        head_dim: Size of a head.
        fingerprint: Hash of all that KV states depend on beside tokens: weights (adapters included),
            configuration, dtype, tokenizer, format version.
        lock: Held around every forward pass.

    Raises:
        UnsupportedModelError: If the model cannot be served exactly; the message says why.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.config = network.config.get_text_config(decoder=True)
        self.lock = threading.RLock()
        self._regime_bound, self._regime_kind = _regime_of(self.config)
        self.dtype = network.get_input_embeddings().weight.dtype
        self.device = network.get_input_embeddings().weight.device
        self.layers = _probe(self)
        self.fingerprint = _fingerprint(self)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def max_length(self) -> int:
        """Context window in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def is_block_fine_tuned(self) -> bool:
        """Whether the model says of itself that it was trained to answer over blocks."""
        return bool(getattr(self.config, "block_fine_tuned", False))

    @property
    def num_parameters(self) -> int:
        """Number of weights, embeddings included."""
        return int(self.network.num_parameters())

    def regime(self, total_length: int) -> str | None:
        """Name the set of frequencies that a prompt of ``total_length`` tokens is encoded with.

        Returns:
            ``""`` for the usual one, ``"long"`` for the second set of longrope (blocks are encoded anew
            for it), and None where the frequencies change with every length, as under dynamic NTK beyond
            the original window: no stored block is exact there, and the prompt is prefilled in full.
        """
        if self._regime_bound is None or total_length <= self._regime_bound:
            return ""
        return "long" if self._regime_kind == "longrope" else None

    def regime_position(self, regime: str) -> int | None:
        """Return a position that shows ``regime`` to the model when it stands in a batch; None if usual."""
        return self._regime_bound if regime == "long" else None

    @contextlib.contextmanager
    def dense_masks(self) -> Iterator[None]:
        """Compute attention with a kernel that takes any mask, inside this call only.

        Flash kernels accept no mask of one row per computed slot; SDPA does.
        """
        used = self.config._attn_implementation
        if used in ("sdpa", "eager"):
            yield
            return
        with self.lock:
            self.config._attn_implementation = "sdpa"
            try:
                yield
            finally:
                self.config._attn_implementation = used

    def mask(self, query_slots: Tensor, visible: Tensor) -> Tensor | dict[str, Tensor]:
        """Build the attention mask of computed slots over a context, for each kind of layer.

        Args:
            query_slots: Slot of each computed token, ``(batch, num_queries)``.
            visible: Whether a slot holds a token, ``(batch, num_slots)``.

        Returns:
            ``(batch, 1, num_queries, num_slots)``, boolean for SDPA and additive for eager attention; a
            mapping from layer type to such a mask if layers differ.
        """
        key_slots = torch.arange(visible.shape[1], device=visible.device)
        behind = query_slots[:, :, None] - key_slots  # (batch, num_queries, num_slots)
        # A slot that holds no token sees itself, because a row without any key would be NaN.
        causal = ((behind >= 0) & visible[:, None]) | (behind == 0)
        masks = {}
        for layer in self.layers:
            if layer.layer_type not in masks:
                seen = causal if layer.window is None else causal & (behind < layer.window)
                masks[layer.layer_type] = self._for_attention(seen[:, None])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _for_attention(self, seen: Tensor) -> Tensor:
        if self.config._attn_implementation != "eager":
            return seen
        zeros = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(self.dtype).min)


class KeyValueTap(Cache):  # type: ignore[misc]
    """A transformers cache that hands keys and values on, and remembers what passed."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Remember what a layer would cache."""
        if layer_idx in self.keys:
            raise UnsupportedModelError(
                f"layer {layer_idx} caches keys more than once a pass; it cannot be served"
            )
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing stands before what passes."""
        return 0


def load_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> Model:
    """Load a model by hub id or local path, or take one that is loaded already as it is.

    Args:
        model: Hub id, local folder, or a causal language model of transformers.
        tokenizer: Needed with a loaded model; otherwise the model's own by default.
        device: Where to put a model that is loaded here; ``"auto"`` spreads it over all devices. None
            takes a GPU if there is one.
        dtype: Of a model that is loaded here, such as ``"bfloat16"``; None keeps that of its files.
        adapter: A PEFT adapter (hub id or folder) to load into a model that is loaded here.

    Raises:
        ModelNotFoundError: If model, tokenizer or adapter cannot be found or read.
        InvalidInputError: If options do not go together.
        UnsupportedModelError: If the model cannot be served exactly.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise InvalidInputError("a loaded model needs its tokenizer; pass tokenizer= beside model=")
        if device is not None or dtype is not None or adapter is not None:
            raise InvalidInputError(
                "device, dtype and adapter apply to a model that is loaded by name; "
                "set them on the loaded model before you pass it"
            )
        network = model
    elif isinstance(model, str | Path):
        network = _load_network(str(model), device, dtype, adapter)
        tokenizer = str(model) if tokenizer is None else tokenizer
    else:
        raise InvalidInputError(
            f"model is {type(model).__name__}; pass a hub id, a folder, or a transformers PreTrainedModel"
        )
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    return Model(network, tokenizer)


def _load_network(
    name: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    adapter: str | Path | None,
) -> PreTrainedModel:
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InvalidInputError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if device == "auto":
        options["device_map"] = "auto"
    try:
        network = AutoModelForCausalLM.from_pretrained(name, **options)
        if adapter is not None:
            network.load_adapter(str(adapter))
    except (OSError, ValueError, KeyError) as error:
        what = name if adapter is None else f"{name} with adapter {adapter}"
        raise ModelNotFoundError(
            f"cannot load model {what}: {_first_line(error)}; give a hub id or a folder with config.json and weights"
        ) from error
    if device == "auto":
        return network
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device {device!r} cannot be used: {_first_line(error)}; try device='cpu'"
        ) from error


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFoundError(
            f"cannot load a tokenizer from {name}: {_first_line(error)}; pass tokenizer= with a folder that has one"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _regime_of(config: Any) -> tuple[int | None, str]:
    """Return the length beyond which rotary frequencies change, and by which rule; None if they never do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            return int(rope["original_max_position_embeddings"]), kind
        if "dynamic" in kind:
            return int(config.max_position_embeddings), kind
    return None, ""


def _one_of_each_pair(table: Tensor) -> Tensor:
    """Drop the copies from a table of cosines that has one entry a dimension: ``(num_tokens, rotary_dim // 2)``."""
    half = table.shape[-1] // 2
    if torch.equal(table[..., :half], table[..., half:]):
        return table[..., :half]
    if torch.equal(table[..., 0::2], table[..., 1::2]):
        return table[..., 0::2]
    return table


def _kept_by_layer(network: PreTrainedModel, config: Any) -> list[tuple[str, int | None]]:
    """Return layer type and window of each layer, or refuse a model that keeps something else."""
    name = type(network).__name__
    try:
        described = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{name} does not describe what its layers cache ({error})") from error
    kept: list[tuple[str, int | None]] = []
    for index, layer in enumerate(described):
        if type(layer) is DynamicLayer:
            kept.append(("full_attention", None))
        elif type(layer) is DynamicSlidingWindowLayer and _layer_type(config, index) == "sliding_attention":
            kept.append(("sliding_attention", int(layer.sliding_window)))
        else:
            raise UnsupportedModelError(
                f"layer {index} of {name} keeps {type(layer).__name__} ({_layer_type(config, index)}) instead of plain "
                "keys and values; state-space, linear, chunked and compressed attention cannot be reused by blocks"
            )
    return kept


def _layer_type(config: Any, index: int) -> str:
    types = getattr(config, "layer_types", None)
    return types[index] if types else "sliding_attention"


@torch.inference_mode()
def _probe(model: Model) -> tuple[Layer, ...]:
    """Find what each layer keeps and how it encodes positions, by encoding one block at two places."""
    name = type(model.network).__name__
    kept = _kept_by_layer(model.network, model.config)
    sources = list(_rotary_sources(model.network))
    if not sources:
        raise UnsupportedModelError(
            f"{name} has no rotary positions (learned or ALiBi positions are tied to their place); "
            "use a model with rotary position embeddings"
        )
    num_tokens = min(_PROBE_TOKENS, model.max_length // 2)
    token_ids = (torch.arange(num_tokens) * 7919 + 13) % model.config.vocab_size
    near = torch.arange(num_tokens)
    far = near + min(_PROBE_OFFSET, model.max_length - num_tokens)
    tap = KeyValueTap()
    try:
        backbone(model.network)(
            input_ids=token_ids.expand(2, -1).to(model.device),
            position_ids=torch.stack((near, far)).to(model.device),
            past_key_values=tap,
            use_cache=True,
        )
    except (TypeError, AttributeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name} cannot run over the states of its own keys and values ({_first_line(error)})"
        ) from error
    _check_shapes(tap, kept, name)
    model.num_kv_heads, model.head_dim = tap.keys[0].shape[1], tap.keys[0].shape[3]
    layers = []
    for index, (layer_type, window) in enumerate(kept):
        rotary = _rotary_of_layer(tap.keys[index], near, far, sources, f"layer {index} of {name}")
        layers.append(Layer(layer_type, window, rotary, tap.keys[index].device))
    if all(layer.rotary is None for layer in layers):
        raise UnsupportedModelError(
            f"the keys of {name} carry no position (ALiBi, or none at all), so blocks cannot be placed; "
            "use a model with rotary position embeddings"
        )
    return tuple(layers)


def _check_shapes(tap: KeyValueTap, kept: Sequence[Any], name: str) -> None:
    if sorted(tap.keys) != list(range(len(kept))):
        raise UnsupportedModelError(
            f"{name} has {len(kept)} layers, but {len(tap.keys)} of them cache keys and values; "
            "models that share states between layers cannot be served"
        )
    shapes = {tuple(states.shape) for states in (*tap.keys.values(), *tap.values.values())}
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        raise UnsupportedModelError(
            f"keys and values of {name} differ in shape ({sorted(shapes)[:2]}), as under multi-head latent "
            "attention; only layers that keep plain keys and values of one shape can be served"
        )


def _rotary_sources(network: nn.Module) -> Iterator[Rotary]:
    """Yield every way in which a model could turn its keys."""
    for module in network.modules():
        tables = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        current = [name for name in tables if not name.endswith("original_inv_freq")]
        takes_type = "layer_type" in inspect.signature(module.forward).parameters
        for table in current:
            layer_type = table.removesuffix("_inv_freq") if takes_type else None
            for interleaved in (False, True):
                yield Rotary(module, layer_type, interleaved)


def _rotary_of_layer(
    keys: Tensor, near: Tensor, far: Tensor, sources: Sequence[Rotary], where: str
) -> Rotary | None:
    """Return the way of turning keys back under which a block is the same at two places."""
    tolerance = _TOLERANCE.get(keys.dtype, 0.1)
    total_length = int(far[-1]) + 1
    errors: list[tuple[float, Rotary | None]] = [(_distance(keys[0], keys[1]), None)]
    for rotary in sources:
        turned = []
        for row, positions in zip(keys, (near, far), strict=True):
            angles = rotary.angles(positions.to(keys.device), total_length=total_length, dtype=keys.dtype)
            if 2 * angles.cos.shape[-1] > keys.shape[-1]:
                break
            turned.append(unrotate_keys(row.float(), angles, interleaved=rotary.interleaved))
        else:
            errors.append((_distance(*turned), rotary))
    error, best = min(errors, key=lambda pair: pair[0])
    if error > tolerance:
        raise UnsupportedModelError(
            f"{where} encodes positions in a way that is not known: the same block at two places differs by "
            f"{error:.2g} after re-encoding, {tolerance:.2g} is allowed; answers would be silently wrong"
        )
    return best


def _distance(one: Tensor, other: Tensor) -> float:
    scale = other.float().norm()
    return float((one.float() - other.float()).norm() / scale) if scale > 0 else 0.0


def backbone(network: PreTrainedModel) -> nn.Module:
    """Return the decoder of a causal language model, without the head that makes logits."""
    return network.get_decoder()  # type: ignore[no-any-return]


def _fingerprint(model: Model) -> str:
    """Hash everything that KV states depend on beside the tokens."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in ignored}
    adapters = {name: value.to_dict() for name, value in getattr(model.network, "peft_config", {}).items()}
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(model.tokenizer.get_vocab().items())
    described = [FORMAT_VERSION, str(model.dtype), config, adapters, vocabulary]
    digest = xxhash.xxh3_128(json.dumps(described, sort_keys=True, default=_as_json).encode())
    for name, weight in model.network.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
