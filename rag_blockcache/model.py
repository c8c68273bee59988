"""A transformers model as the other stages see it: its layers, its masks, and the name of its weights."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_blockcache import attention as grouped_attention
from rag_blockcache.kv_states import Buffers
from rag_blockcache.layers import Layer, Rotary, find_layers
from rag_blockcache.rotary import Angles
from rag_blockcache.sdpa_backends import without_cudnn
from rag_blockcache.training_record import TrainingRecord

# Of KV states and of the names of blocks: an index of another one is refused, not missed block by block.
FORMAT_VERSION = 2
_NOT_OF_THE_STATES = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "dtype",
    "torch_dtype",
}


class Model:
    """A causal language model of transformers.

    It is used as it is: never copied, never patched. Its weights must not change while it is in use. A model
    in training mode is in evaluation mode during forward passes, and in training mode again after them.

    Args:
        network: A causal language model with rotary positions.
        tokenizer: Its tokenizer.
        training_record: What its weights, or their adapter, say of their training; None if nothing.

    Attributes:
        layers: What each layer keeps, in order.
        fingerprint: Hash of all that KV states depend on beside tokens: weights (adapters included),
            configuration, dtype, tokenizer, format version.
        lock: Held around every forward pass.
        buffers: Memory for contexts, used again from one to the next.
        takes_any_attention: Whether its layers call attention by the name in its configuration.
        cuda_graphs: Whether kernels of our own and CUDA graphs may be used on a GPU; see ``gpu``.

    Raises:
        UnsupportedModelError: If the model cannot be served exactly; the message says why.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        training_record: TrainingRecord | None = None,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.training_record = training_record
        self.config = network.config.get_text_config(decoder=True)
        self.lock = threading.RLock()
        self.buffers = Buffers()
        self.cuda_graphs = False
        weight = cast(Tensor, network.get_input_embeddings().weight)
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        # Others look for the names that they know, and would not call ours.
        self.takes_any_attention = bool(getattr(network, "_supports_attention_backend", False))
        grouped_attention.register()
        with self.inference():
            self.layers = find_layers(network)
        self._regime_bound, self._regime_kind = _regime_of(self.config)
        self._angles: dict[tuple[Rotary, torch.device], Angles] = {}
        self.fingerprint = _fingerprint(self)

    @property
    def backbone(self) -> nn.Module:
        """The decoder, without the head that makes logits."""
        return cast(nn.Module, self.network.get_decoder())  # type: ignore[no-untyped-call]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads a layer."""
        return self.layers[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.layers[0].head_dim

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the embedding."""
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Context window in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens; special ones are left out, or shown on demand."""
        # Cleaning up would change text that was streamed already.
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    @property
    def is_block_fine_tuned(self) -> bool:
        """Whether the model says of itself that it was trained to answer over blocks."""
        if self.training_record is not None:
            return self.training_record.block_fine_tuned
        return bool(getattr(self.config, "block_fine_tuned", False))

    @property
    def trained_sight(self) -> str | None:
        """What blocks saw beside themselves when the model was trained on them; None if it never was."""
        if not self.is_block_fine_tuned:
            return None
        return "themselves" if self.training_record is None else self.training_record.blocks_see

    @property
    def num_parameters(self) -> int:
        """Number of weights, embeddings included."""
        return int(self.network.num_parameters())

    def regime(self, total_length: int) -> str | None:
        """Name the set of frequencies that a prompt of ``total_length`` tokens is encoded with.

        Returns:
            ``""`` for the usual one, ``"long"`` for the second set of longrope (blocks are encoded anew
            for it), and None where they change with every length, as under dynamic NTK beyond the original
            window, or attention depends on positions otherwise: no stored block is exact there, and the
            prompt is prefilled in full.
        """
        if self._regime_bound is None or total_length <= self._regime_bound:
            return ""
        return "long" if self._regime_kind == "longrope" else None

    def angles(self, layer: Layer, reach: int, total_length: int) -> Angles | None:
        """Return the angles of all positions before ``reach``, and maybe further ones, as a layer turns keys.

        They are kept from one prompt to the next, where its length does not choose the frequencies.

        Args:
            layer: One of ``layers``.
            reach: Number of positions.
            total_length: Tokens of the prompt.

        Returns:
            None if keys of the layer carry no position.
        """
        if layer.rotary is None:
            return None
        with self.lock:  # some rotary modules change with the length that they are shown
            if self.regime(total_length) != "":
                return self._new_angles(layer, reach, total_length)
            known = self._angles.get((layer.rotary, layer.device))
            if known is None or len(known.cos) < reach:
                size = 1 << max(reach - 1, 1023).bit_length()  # the next longer prompt finds its own too
                size = min(size, self._regime_bound or size)
                known = self._new_angles(layer, size, size)
                self._angles[layer.rotary, layer.device] = known
            return known

    @torch.inference_mode()
    def _new_angles(self, layer: Layer, reach: int, total_length: int) -> Angles:
        assert layer.rotary is not None
        return layer.rotary.angles(torch.arange(reach, device=layer.device), total_length=total_length)

    def regime_position(self, regime: str) -> int | None:
        """Return a position that shows ``regime`` to the model when it stands in a batch; None if usual."""
        return self._regime_bound if regime == "long" else None

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Hold the lock, switch dropout off, and choose how attention is computed, inside this block only."""
        with self.lock, without_cudnn() if self.device.type == "cuda" else contextlib.nullcontext():
            training = [m for m in self.network.modules() if m.training] if self.network.training else []
            attention = self.config._attn_implementation
            for module in training:
                module.training = False
            if attention == "sdpa" and self.device.type == "cpu" and self.takes_any_attention:
                self.config._attn_implementation = grouped_attention.NAME
            try:
                yield
            finally:
                self.config._attn_implementation = attention
                for module in training:
                    module.training = True

    @property
    def can_be_observed(self) -> bool:
        """Whether ``observing`` works: attention is called by name, and not of a kind of its own."""
        return self.takes_any_attention and self.config._attn_implementation != "eager"

    @contextlib.contextmanager
    def observing(self, observer: grouped_attention.Observer) -> Iterator[None]:
        """Show the queries and keys of each layer to ``observer``, in passes inside this block only."""
        assert self.can_be_observed, "the planner refuses policies that would need it"
        with self.lock, grouped_attention.observed(observer):
            attention = self.config._attn_implementation
            self.config._attn_implementation = grouped_attention.NAME
            try:
                yield
            finally:
                self.config._attn_implementation = attention

    @contextlib.contextmanager
    def dense_masks(self) -> Iterator[None]:
        """Compute attention with a kernel that takes any mask, inside this block only.

        Flash kernels accept no mask of one row per computed slot; SDPA does.
        """
        with self.lock:  # another thread's pass may use another attention at this moment
            used = self.config._attn_implementation
            is_dense = used in ("sdpa", "eager", grouped_attention.NAME)
            self.config._attn_implementation = used if is_dense else "sdpa"
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


def _regime_of(config: Any) -> tuple[int | None, str]:
    """Return the length beyond which rotary frequencies change, and by which rule; None if they never do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in nested:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            return int(rope["original_max_position_embeddings"]), kind
        if rope.get("llama_4_scaling_beta"):  # queries grow with their position beyond this one (Ministral 3)
            return int(rope["original_max_position_embeddings"]), kind
        if "dynamic" in kind:
            return int(config.max_position_embeddings), kind
    return None, ""


def _fingerprint(model: Model) -> str:
    """Hash everything that KV states depend on beside the tokens."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_STATES}
    described = [FORMAT_VERSION, str(model.dtype), config, _adapters(model.network), _tokenization(model)]
    digest = xxhash.xxh3_128(json.dumps(described, sort_keys=True, default=_as_json).encode())
    for name, weight in model.network.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapters(network: PreTrainedModel) -> list[Any]:
    """Return the adapters of a model, and which of them are in use where."""
    configs = {name: value.to_dict() for name, value in getattr(network, "peft_config", {}).items()}
    uses = [
        [name, list(module.active_adapters), bool(module.disable_adapters), list(module.merged_adapters)]
        for name, module in network.named_modules()
        if hasattr(module, "merged_adapters")
    ]
    return [configs, uses]


def _tokenization(model: Model) -> Any:
    """Return what tokens depend on; truncation and padding are settings of the last call, not of these."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(model.tokenizer.get_vocab().items())
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
