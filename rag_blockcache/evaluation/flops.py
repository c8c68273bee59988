"""FLOPs of a forward pass, attention included, from the shapes of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rag_blockcache.model import Model


@dataclass(frozen=True)
class ForwardFlops:
    """Floating-point operations of one forward pass; a multiplication and an addition are two.

    Attributes:
        linear: Products with the weights of the layers.
        attention: Scores and weighted values, over the slots that each query sees.
        head: Logits.
    """

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head


def forward_flops(model: Model, positions: Sequence[int], *, num_logits: int = 1) -> ForwardFlops:
    """Count the matrix products of a pass over some tokens of a prompt.

    A token attends to itself and all before it, whether the pass computes them or finds them placed. A
    kernel that computes masked scores too, as eager attention does, does up to twice the attention of a full
    prefill. Left out: norms, activations, rotary encoding (the turning of placed keys included), softmax;
    they are some hundredths of the whole.

    Args:
        model: The model; of a mixture of experts, those that a token is routed to count.
        positions: Position of each computed token: ``range(n)`` for a full prefill, the last of the prompt
            for its final block.
        num_logits: Tokens whose logits are computed.
    """
    per_pair = 4 * model.config.num_attention_heads * model.head_dim  # scores and values, two each
    pairs = sum(_visible_pairs(positions, layer.window) for layer in model.layers)
    head = model.network.get_output_embeddings()  # type: ignore[no-untyped-call]
    return ForwardFlops(
        linear=2 * _weights_per_token(model) * len(positions),
        attention=per_pair * pairs,
        head=2 * head.weight.numel() * num_logits,
    )


def _visible_pairs(positions: Sequence[int], window: int | None) -> int:
    """Return how many slots the tokens at ``positions`` see, all together."""
    return sum(position + 1 if window is None else min(position + 1, window) for position in positions)


def _weights_per_token(model: Model) -> int:
    """Return how many weights of the layers a token is multiplied with."""
    embedding = model.network.get_input_embeddings().weight
    experts = getattr(model.config, "num_experts_per_tok", None)
    num_weights = 0
    for weight in model.backbone.parameters():
        if weight.ndim == 2 and weight is not embedding:
            num_weights += weight.numel()
        elif weight.ndim == 3 and experts:  # (num_experts, rows, columns)
            num_weights += weight[0].numel() * experts
    return num_weights
