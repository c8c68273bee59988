"""Passes over the computed slots of one prompt: our attention, and short ones as CUDA graphs.

Over a long context a short pass is little work in thousands of launches, which take longer than the work. A
graph launches them all at once. It reads what to compute, and where the context lies, from buffers at fixed
addresses, so that one graph for each number of tokens serves every context and every length.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag_blockcache import attention as grouped_attention
from rag_blockcache.gpu import DTYPES, LayeredStates
from rag_blockcache.gpu.attention import Slots, attend, write_states
from rag_blockcache.gpu.fused_layers import MAX_TOKENS, FusedLayers, fused_layers_of
from rag_blockcache.gpu.network_state import NetworkState
from rag_blockcache.gpu.norms import FusedNorms
from rag_blockcache.model import Model

logger = logging.getLogger(__name__)

NAME = "rag_blockcache_slots"
BUCKETS = (1, 16, 32, 64, 128, 256)  # tokens of a graph; a pass is filled up to the next of them
_SEEN_ONCE = 1  # a shape is captured when it comes again
_PLAIN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"}


def bucket_of(num_tokens: int) -> int | None:
    """Return how many tokens the graph has that takes so many; None if there is no such graph."""
    return next((size for size in BUCKETS if num_tokens <= size), None)


class Passes:
    """Runs passes of one model, and keeps their graphs.

    Args:
        model: The model, which is not kept.
    """

    def __init__(self, model: Model) -> None:
        AttentionInterface.register(NAME, _attend_from_slots)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self._device, self._num_layers = model.device, model.num_layers
        self._is_usable = _fits(model)
        self._graphs: dict[int, _Graph] = {}
        self._num_seen: Counter[int] = Counter()
        self._state: NetworkState | None = None
        self._norms: FusedNorms | None = None
        self._layers: FusedLayers | None = None
        self._done: torch.cuda.Event | None = None

    def run(
        self, model: Model, context: LayeredStates, token_ids: Tensor, positions: Tensor, num_logits: int
    ) -> Tensor | None:
        """Run a pass; see ``gpu.run_pass``."""
        num_tokens = len(positions)
        # Where nothing is placed, causal attention of torch is as fast, and needs no room for splits.
        is_all = num_tokens > BUCKETS[-1] and int(positions[-1]) == num_tokens - 1
        if not self._is_usable or is_all:
            return None
        try:
            with model.inference(), _on(self._device), _using_slots(model) as is_possible:
                if not is_possible:
                    return None
                self._wait()
                with self._norms_of(model).used():
                    logits = self._run(model, context, token_ids, positions, num_logits)
                self._done = _recorded(self._device)
                return logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a pass of a foreign model can fail in any way, and there is another
            logger.warning("passes of this model go the ordinary way from now on: %s", error)
            self._is_usable = False
            self._graphs.clear()
            return None

    def _run(
        self, model: Model, context: LayeredStates, token_ids: Tensor, positions: Tensor, num_logits: int
    ) -> Tensor:
        size = bucket_of(len(positions)) if num_logits == 1 and self._can_capture() else None
        if size in self._graphs:
            return self._graphs[size].replay(context, token_ids, positions)
        inputs = _Inputs(size or len(positions), self._num_layers, self._device)
        inputs.fill(context, token_ids, positions)
        if size is None:
            return _forward(model, inputs, num_logits)
        self._num_seen[size] += 1
        if self._num_seen[size] <= _SEEN_ONCE:
            return _forward(model, inputs, num_logits)
        logits, self._graphs[size] = _captured(model, inputs, self._layers)
        return logits

    def _norms_of(self, model: Model) -> FusedNorms:
        """Return the norms; graphs that read other weights than those in use, or run other modules, go."""
        if self._norms is None or self._state is None or not self._state.is_current():
            self._graphs.clear()
            self._num_seen.clear()
            self._state, self._norms = NetworkState(model.network), FusedNorms(model.network)
            self._layers = fused_layers_of(
                model.network, self._norms.eps, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim
            )
        return self._norms

    def _can_capture(self) -> bool:
        return self._device.type == "cuda" and self._state is not None and not self._state.has_hooks

    def _wait(self) -> None:
        """Wait until the pass before has read its inputs: it may run on another stream."""
        if self._done is not None:
            self._done.synchronize()


_passes: weakref.WeakKeyDictionary[Model, Passes] = weakref.WeakKeyDictionary()


def passes_of(model: Model) -> Passes:
    """Return the passes of a model, which live as long as it does."""
    with model.lock:
        if model not in _passes:
            _passes[model] = Passes(model)
        return _passes[model]


class _Inputs:
    """What a pass computes and where, at fixed addresses on the device; filled by one copy from the host.

    Args:
        num_tokens: Tokens of the pass.
        num_layers: Layers of the model.
        device: Where it runs.
    """

    def __init__(self, num_tokens: int, num_layers: int, device: torch.device) -> None:
        width = (
            num_tokens + num_tokens % 2
        )  # parts begin at multiples of 16 bytes: kernels are compiled for that
        parts = [width, width, width, 1 + 2 * num_layers]
        self._host = torch.empty(sum(parts), dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.empty(sum(parts), dtype=torch.long, device=device)
        self._host_parts = torch.split(self._host, parts)
        token_ids, positions, slots, table = torch.split(self._device, parts)
        self.token_ids, self.positions = token_ids[:num_tokens][None], positions[:num_tokens][None]
        self.at = Slots(table, slots[:num_tokens])
        # Has transformers build none; attention knows from the slots what is seen.
        self.mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        self._num_tokens = num_tokens

    def fill(self, context: LayeredStates, token_ids: Tensor, positions: Tensor) -> None:
        """Say what to compute. Tokens that fill up the pass stand in front, so that the last is the last."""
        ids, places, slots, table = self._host_parts
        tokens = slice(self._num_tokens - len(positions), self._num_tokens)
        for part, filler in ((ids, 0), (places, 0), (slots, -1)):
            part[: tokens.start] = filler
        places[tokens] = slots[tokens] = positions
        if token_ids.device.type == "cpu":
            ids[tokens] = token_ids
        table.numpy()[:] = _addresses(context, (len(table) - 1) // 2)
        self._device.copy_(self._host, non_blocking=True)
        if token_ids.device.type != "cpu":  # reading them here would wait for the device
            self.token_ids[0, tokens] = token_ids


def _addresses(context: LayeredStates, num_layers: int) -> list[int]:
    """Return the table that ``attention_kernels`` reads."""
    states = [context.states_of_layer(layer) for layer in range(num_layers)]
    return [states[0][0].stride(1), *(tensor.data_ptr() for pair in states for tensor in pair)]


class _Graph:
    """A captured pass.

    Args:
        inputs: What it reads.
        graph: The launches.
        logits: Where it writes, ``(1, 1, vocab_size)``.
    """

    def __init__(self, inputs: _Inputs, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        self._inputs, self._graph, self._logits = inputs, graph, logits

    def replay(self, context: LayeredStates, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the pass; its logits are a copy, because the next pass writes over them."""
        self._inputs.fill(context, token_ids, positions)
        self._graph.replay()
        return self._logits.clone()


def _captured(model: Model, inputs: _Inputs, layers: FusedLayers | None) -> tuple[Tensor, _Graph]:
    """Run a pass once more as it is, which allocates what libraries allocate once; then capture it.

    Returns:
        The logits of the pass that was run, and the graph.
    """
    stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(model.device))
    with torch.cuda.stream(stream):
        logits, forward = _best_way(model, inputs, layers)
    torch.cuda.current_stream(model.device).wait_stream(stream)
    logits = logits.clone()
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        captured = forward()
    return logits, _Graph(inputs, graph, captured)


def _best_way(
    model: Model, inputs: _Inputs, layers: FusedLayers | None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Run a pass, and tell how to run it again: by fused layers, if they agree with the network."""
    ordinary = partial(_forward, model, inputs, 1)
    if layers is None or inputs.token_ids.shape[1] > MAX_TOKENS:
        return ordinary(), ordinary
    try:
        agree = layers.agrees(
            ordinary, partial(_run_layer, inputs), inputs.token_ids, inputs.positions, inputs.at
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a layer that takes something else
        logger.debug("the layers of this model stay as they are: %s", error)
        agree = False
    fused = partial(layers.forward, inputs.token_ids, inputs.positions, inputs.at)
    forward = fused if agree else ordinary
    return forward(), forward  # writes what the layers were tried on once more


def _run_layer(
    inputs: _Inputs, layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Run one layer of the network, as the network does."""
    with _slots_of(inputs) as cache:
        output = layer(
            hidden,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=position_embeddings,
        )
    return output if isinstance(output, Tensor) else output[0]


def _forward(model: Model, inputs: _Inputs, num_logits: int) -> Tensor:
    with _slots_of(inputs) as cache:
        output = model.network(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            attention_mask=inputs.mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
    return output.logits[:, -num_logits:]  # type: ignore[no-any-return]


@contextmanager
def _slots_of(inputs: _Inputs) -> Iterator[_SlotCache]:
    """Have attention find the slots of a pass, in this thread."""
    cache = _SlotCache(inputs.at, inputs.mask)
    token = _current.set(cache)
    try:
        yield cache
    finally:
        _current.reset(token)


class _SlotCache(Cache):
    """A transformers cache that writes computed states into a context, and remembers of which layer."""

    def __init__(self, at: Slots, mask: Tensor) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.at, self.mask = at, mask
        self.layer = -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of a layer; attention finds them in the context."""
        write_states(key_states, value_states, self.at, layer_idx)
        self.layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: where tokens stand is said by their positions."""
        return 0


_current: ContextVar[_SlotCache | None] = ContextVar("rag_blockcache_slot_cache", default=None)


def _attend_from_slots(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as ``attention.attend`` does, over the context of the pass that runs."""
    cache = _current.get()
    if cache is None:  # a thread of the user's runs the network itself meanwhile
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unusual = [
        name
        for name, value in options.items()
        if name not in _PLAIN and not (isinstance(value, bool | int | float | None) and not value)
    ]
    if attention_mask is not cache.mask or options.get("dropout") or unusual:
        raise TypeError(f"{type(module).__name__} asks for attention of its own kind: {unusual or 'a mask'}")
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return attend(query, cache.at, cache.layer, num_kv_heads=key.shape[1], scaling=scaling), None


def _fits(model: Model) -> bool:
    """Return whether our attention is that of all layers of a model, and one device holds them."""
    return (
        model.takes_any_attention
        and model.dtype in DTYPES
        and model.head_dim % 16 == 0
        and model.head_dim <= 256
        and model.regime(sys.maxsize) == ""
        and all(layer.window is None and layer.device == model.device for layer in model.layers)
    )


@contextmanager
def _using_slots(model: Model) -> Iterator[bool]:
    """Have the model attend by ``NAME``, inside this block only; its lock is held.

    Yields:
        Whether that is done; not where the user chose another attention, or somebody looks at it.
    """
    used = model.config._attn_implementation
    usual = grouped_attention.NAME if model.device.type == "cpu" else "sdpa"  # inside ``model.inference()``
    if used != usual:
        yield False
        return
    model.config._attn_implementation = NAME
    try:
        yield True
    finally:
        model.config._attn_implementation = used


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
