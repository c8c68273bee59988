"""What watches ``generate()`` of transformers at every step: clock, reader of a stream, reasons to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from rag_blockcache.model import Model


class Monitor(StoppingCriteria):
    """Sees every step: keeps the clock, reports tokens of the first row, ends rows.

    Attributes:
        cancelled: Set it, from any thread, and decoding stops after the current token.
        criteria: Asked at every step whether a row ends, so that it is known which one ended where.
        ended: Number of new tokens of each row that ended by a criterion.
        first_token_time: ``time.perf_counter()`` when the first token was chosen; None before.
        last_token_time: Likewise of the latest.
        prompt_width: Tokens in front of the first new one.
        num_tokens: New tokens so far, in a row.
    """

    def __init__(self, on_token: Callable[[int], None] | None = None) -> None:
        self.cancelled = threading.Event()
        self.criteria = StoppingCriteriaList()
        self.ended: dict[int, int] = {}
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.prompt_width = 0
        self.num_tokens = 0
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Take note of one step; called by transformers after each."""
        self.last_token_time = time.perf_counter()
        if self.first_token_time is None:
            self.first_token_time = self.last_token_time
        known = self.prompt_width + self.num_tokens
        self.num_tokens = input_ids.shape[1] - self.prompt_width
        if self._on_token is not None:
            for token in input_ids[0, known:].tolist():
                self._on_token(token)
        is_done: Tensor = self.criteria(input_ids, scores, **more)
        for row in is_done.nonzero()[:, 0].tolist():
            self.ended.setdefault(row, self.num_tokens)
        return is_done | self.cancelled.is_set()


class StopStrings(StoppingCriteria):
    """Ends a row whose new text holds one of some strings.

    That of transformers looks at every token of the vocabulary first, which costs a good part of a second
    before the first token, and it also matches strings that begin in the prompt.

    Args:
        model: Makes text of tokens.
        strings: What ends a row; special tokens may be among them.
        prompt_width: Tokens in front of the first new one.
    """

    def __init__(self, model: Model, strings: Sequence[str], prompt_width: int) -> None:
        self._model, self._strings, self._prompt_width = model, strings, prompt_width
        self._num_seen = 0
        # A character takes four tokens at most.
        self._reach = 4 * max(map(len, strings)) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows end; called at every step."""
        start = max(self._prompt_width, self._prompt_width + self._num_seen - self._reach)
        self._num_seen = input_ids.shape[1] - self._prompt_width
        texts = [self._model.text(row[start:].tolist(), special=True) for row in input_ids]
        found = [any(stop in text for stop in self._strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)
