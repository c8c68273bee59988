"""A way to the first token of a prompt: what all alternatives have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from alternatives.prompts import Request


@dataclass(frozen=True)
class FirstToken:
    """The first token of an answer.

    Attributes:
        token: The most likely one.
        logits: ``(vocab_size,)``; None where only the token is known.
        num_reused: Tokens of the prompt whose keys and values were there already.
    """

    token: int
    logits: Tensor | None = None
    num_reused: int = 0


class Way(ABC):
    """Takes requests to their first tokens.

    Attributes:
        stands_for: The attention whose logits it should give, ``full`` or ``block``; empty for one that lies
            between them.
        loss: How far from them its logits may be beyond rounding, relative: what a codec loses, no more.
    """

    stands_for = "full"
    loss = 0.0

    def prepare(self, request: Request) -> None:  # noqa: B027  # most have nothing to do
        """Do what is done when passages are indexed; nobody waits for it."""

    @abstractmethod
    def first_token(self, request: Request) -> FirstToken:
        """Compute the first token: what is timed."""

    def with_logits(self, request: Request) -> FirstToken:
        """Compute the first token with its logits, to be checked before anything is timed."""
        return self.first_token(request)

    def close(self) -> None:  # noqa: B027
        """Let go of files and processes."""


class TransformersWay(Way):
    """One that ends in a forward pass of transformers over a cache.

    Args:
        network: The bare model.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        self.network = network

    @abstractmethod
    def cached(self, request: Request) -> DynamicCache:
        """Return keys and values of the tokens in front; those that are not in it are computed."""

    @torch.inference_mode()
    def prefill(self, request: Request) -> tuple[Tensor, DynamicCache, int]:
        """Return the logits of the first token, the cache to go on from, and how many tokens it held."""
        cache = self.cached(request)
        num_reused = cache.get_seq_length()
        input_ids = torch.tensor([request.token_ids[num_reused:]], device=self.network.device)
        output = self.network(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], cache, num_reused

    def first_token(self, request: Request) -> FirstToken:
        logits, _, num_reused = self.prefill(request)
        return FirstToken(int(logits.argmax()), logits, num_reused)


Layers = list[tuple[Tensor, Tensor]]  # keys and values, each (1, num_kv_heads, num_tokens, head_dim)


def layers_of(cache: DynamicCache) -> Layers:
    """Return keys and values of every layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def joined(parts: Iterable[Layers]) -> Layers:
    """Put runs of tokens one behind the other, layer by layer."""
    return [
        (torch.cat([keys for keys, _ in layer], dim=2), torch.cat([values for _, values in layer], dim=2))
        for layer in zip(*parts, strict=True)
    ]


def cache_of(layers: Layers) -> DynamicCache:
    """Return a cache that holds these tensors, without a copy."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
