"""TurboRAG: a file for each chunk, and an attention that turns all keys anew at every step.

As in the authors' code (https://arxiv.org/abs/2410.07590): the model is changed so that keys go into the
cache before they are turned; the states of a chunk are saved by ``torch.save``; a request loads its files,
puts them together layer by layer behind the preamble, which stays in memory, and computes the rest of the
prompt. In every layer, at every step, decoding too, the keys of the whole run are turned again. Theirs
multiplies attention scores out; this one calls the same SDPA as stock transformers, which is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from alternatives.prompts import Request
from alternatives.way import Layers, TransformersWay, cache_of, joined, layers_of


class PositionFreeAttention(LlamaAttention):
    """Caches keys before they are turned, and turns them all whenever they are read."""

    table: tuple[Tensor, Tensor]  # cosines and sines of all positions, (max_length, head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to all keys of the cache."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys, values = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = past_key_values.update(keys, values, self.layer_idx)
        cos, sin = (part[: keys.shape[2]] for part in self.table)
        keys = keys * cos + rotate_half(keys) * sin
        cos, sin = (part[:, None] for part in position_embeddings)
        queries = queries * cos + rotate_half(queries) * sin
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output, weights = attend(
            self, queries, keys, values, attention_mask, dropout=0.0, scaling=self.scaling, **more
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def position_free(network: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the model with the attention of TurboRAG, over the same weights."""
    changed = copy.deepcopy(network, {id(part): part for part in network.parameters()})
    positions = torch.arange(network.config.max_position_embeddings, device=network.device)[None]
    embeddings = torch.empty(0, dtype=network.dtype, device=network.device)
    cos, sin = network.model.rotary_emb(embeddings, positions)
    for layer in changed.model.layers:
        layer.self_attn.__class__ = PositionFreeAttention
        layer.self_attn.table = (cos[0], sin[0])
    return changed


class TurboRAG(TransformersWay):
    """Reads the states of chunks from files, which the page cache of the system holds.

    Args:
        network: A Llama; it is left as it is.
        folder: Takes the files.
    """

    stands_for = "block"

    def __init__(self, network: LlamaForCausalLM, folder: Path) -> None:
        super().__init__(position_free(network))
        self._folder = folder
        self._preamble: Layers = []

    @torch.inference_mode()
    def prepare(self, request: Request) -> None:
        """Write the files of the chunks, and keep the preamble."""
        preamble, *chunks, _ = request.segments
        self._preamble = self._encoded(preamble)
        for chunk in chunks:
            torch.save(self._encoded(chunk), self._file(chunk))

    def cached(self, request: Request) -> DynamicCache:
        device = self.network.device
        chunks = [
            torch.load(self._file(chunk), weights_only=True, map_location=device)
            for chunk in request.segments[1:-1]
        ]
        return cache_of(joined([self._preamble, *chunks]))

    def _encoded(self, token_ids: Sequence[int]) -> Layers:
        cache = DynamicCache()
        input_ids = torch.tensor([token_ids], device=self.network.device)
        self.network(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return layers_of(cache)

    def _file(self, chunk: tuple[int, ...]) -> Path:
        return self._folder / f"{hash(chunk) % 2**64:016x}.pt"
