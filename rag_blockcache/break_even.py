"""Whether reusing tokens is sooner than computing them, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rag_blockcache.assembler import Context
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.generator import Computed, prefill
from rag_blockcache.kv_states import Placement
from rag_blockcache.model import Model

_SHORT = 8
_LONG = {"cpu": 32, "cuda": 512}  # a GPU needs more tokens before it takes longer for them
_BESIDE_PLACED = 0.15  # what a token takes longer where not all slots are computed, as a share of its time
_LOOKUP_SECONDS = 0.0005  # a look-up and a memory map, each block of a request included


@dataclass(frozen=True)
class _Costs:
    """Seconds of a forward pass and of placing a block, each fixed and for one token more."""

    forward: float
    forward_token: float
    placing: float
    placing_token: float


class BreakEven:
    """Compares what reuse costs with what it saves.

    Args:
        model: Both are measured on it now, which takes a fraction of a second; at the first question, the
            measurement would be part of its time to first token.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._costs = self._measure()

    def pays(self, num_reused: int, num_computed: int = 0, num_looked: int = 0) -> bool:
        """Return whether reusing tokens is sooner than computing them.

        Args:
            num_reused: Tokens that are placed and not computed again.
            num_computed: All other tokens of the prompt.
            num_looked: Tokens of a pass that only chooses what to compute again; 0 if there is none.
        """
        costs = self._costs
        if costs is None or not num_reused:
            return False
        spent = _LOOKUP_SECONDS + costs.placing + num_reused * costs.placing_token
        spent += _BESIDE_PLACED * num_computed * costs.forward_token
        if num_looked:
            spent += costs.forward + num_looked * costs.forward_token
        return spent <= num_reused * costs.forward_token

    def _measure(self) -> _Costs | None:
        long = min(_LONG.get(self._model.device.type, 512), self._model.max_length)
        if long <= _SHORT:  # a window too short to measure anything in
            return None
        short = self._prefill_seconds(_SHORT)
        each = max(self._prefill_seconds(long) - short, 0.0) / (long - _SHORT)
        return _Costs(max(short - _SHORT * each, 0.0), each, *self._placing_seconds(long))

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
