"""The logits that a way should give: one forward pass over the whole prompt, with a mask spelled out."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alternatives.prompts import Request


def visible(lengths: list[int], attention: str, device: torch.device | None = None) -> Tensor:
    """Return what each token attends to, ``(num_tokens, num_tokens)``.

    Args:
        lengths: Tokens of each segment.
        attention: ``full``, or ``block``: segments see only themselves, and the last one everything.
        device: Where the mask goes.
    """
    seen = torch.ones(sum(lengths), sum(lengths), dtype=torch.bool, device=device).tril()
    if attention == "block":
        end = 0
        for length in lengths[:-1]:
            seen[end : end + length, :end] = False
            end += length
    return seen


@torch.inference_mode()
def reference_logits(network: PreTrainedModel, request: Request, attention: str) -> Tensor:
    """Return the logits of the first token, ``(vocab_size,)``; no cache, nothing moved."""
    input_ids = torch.tensor([request.token_ids], device=network.device)
    mask = visible([len(segment) for segment in request.segments], attention, network.device)
    output = network(input_ids=input_ids, attention_mask=mask[None, None], use_cache=False, logits_to_keep=1)
    return output.logits[0, -1]


def distance(logits: Tensor, reference: Tensor) -> float:
    """Return how far logits are from others, relative to these."""
    reference = reference.float()
    return float((logits.float().to(reference.device) - reference).norm() / reference.norm())
