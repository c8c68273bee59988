"""Perplexity of a text under a model's ordinary attention: whether training has cost it anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.model import Model


@dataclass(frozen=True)
class Perplexity:
    """How well a model foresees a text.

    Attributes:
        perplexity: Exponential of the mean negative log-likelihood of a token.
        num_tokens: Tokens that were foreseen: all but the first.
        window: Most tokens that the model saw at a time.
    """

    perplexity: float
    num_tokens: int
    window: int


@torch.inference_mode()
def text_perplexity(model: Model, text: str, *, window: int = 1024) -> Perplexity:
    """Measure the perplexity of a text, without a chat template.

    A window slides by half its length, and each token but the first is foreseen once, from at least half a
    window of text where there is so much before it.

    Args:
        model: The model.
        text: Any text of two tokens or more.
        window: Most tokens at a time, at most those of the model's context window.

    Raises:
        InvalidInputError: If the text is shorter than two tokens, or the window is.
    """
    token_ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
    window = min(window, model.max_length)
    if len(token_ids) < 2 or window < 2:
        raise InvalidInputError(
            f"the text has {len(token_ids)} tokens and the window {window}; both need 2 at least"
        )
    log_likelihood, seen = 0.0, 1
    while seen < len(token_ids):
        stop = min(len(token_ids), window if seen == 1 else seen + window // 2)
        start = max(0, stop - window)
        log_likelihood += float(_log_probabilities(model, token_ids[start:stop])[seen - start - 1 :].sum())
        seen = stop
    num_tokens = len(token_ids) - 1
    return Perplexity(math.exp(-log_likelihood / num_tokens), num_tokens, window)


def _log_probabilities(model: Model, token_ids: Tensor) -> Tensor:
    """Return the log-probability of each token but the first, ``(num_tokens - 1,)``, float64."""
    with model.inference():
        logits = model.network(input_ids=token_ids[None].to(model.device), use_cache=False).logits[0, :-1]
    chosen = token_ids[1:, None].to(logits.device)
    found: Tensor = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0]
    return found.double()
