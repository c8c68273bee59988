"""From how many reused tokens on reuse is sooner than computing them, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from rag_blockcache.assembler import Context, Placement
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.model import Model

_SHORT = 8
_LONG = {"cpu": 32, "cuda": 512}  # a GPU needs more tokens before it takes longer for them
_LOOKUP_SECONDS = 0.0005  # a look-up and a memory map, each block of a request included


class BreakEven:
    """Compares what reuse costs with what it saves.

    Args:
        model: Both are measured on it now, which takes a fraction of a second; at the first question, the
            measurement would be part of its time to first token.

    Attributes:
        num_tokens: Fewest reused tokens for which reuse is sooner; infinite if it never is.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.num_tokens = self._measure()

    def pays(self, num_reused: int) -> bool:
        """Return whether reusing so many tokens is sooner than computing them."""
        return num_reused > 0 and num_reused >= self.num_tokens

    def _measure(self) -> float:
        long = min(_LONG.get(self._model.device.type, 512), self._model.max_length)
        if long <= _SHORT:  # a window too short to measure anything in
            return float("inf")
        saved = (self._prefill_seconds(long) - self._prefill_seconds(_SHORT)) / (long - _SHORT)
        fixed, each = self._placing_seconds(long)
        return float("inf") if saved <= each else (fixed + _LOOKUP_SECONDS) / (saved - each)

    def _prefill_seconds(self, num_tokens: int) -> float:
        computed = Computed(
            torch.arange(num_tokens), torch.arange(num_tokens) % self._model.config.vocab_size
        )
        return min(
            self._timed(lambda: prefill(self._model, Context(self._model, [num_tokens]), [computed]))
            for _ in range(2)
        )

    def _placing_seconds(self, num_tokens: int) -> tuple[float, float]:
        """Return the seconds that placing takes, fixed and for each token."""
        token_ids = [i % self._model.config.vocab_size for i in range(num_tokens)]
        [[(_, states)]] = encode_blocks(self._model, [token_ids])
        context = Context(self._model, [num_tokens])
        short, long = (
            min(self._timed(partial(context.place, 0, [Placement(part, 0)], num_tokens)) for _ in range(3))
            for part in (states.prefix(_SHORT), states)
        )
        each = max(long - short, 0.0) / (num_tokens - _SHORT)
        return short, each

    def _timed(self, run: Callable[[], object]) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        start = time.perf_counter()
        run()
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter() - start
