"""Linear layers with an adapter, in fewer passes over the activations than PEFT takes.

PEFT keeps the weights of an adapter in float32 and brings activations there and back, scales what comes out
and adds it, each a pass of its own. Over long rows and small layers these passes are most of a step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class FusedLinear(Linear):
    """A linear layer of PEFT that computes what it computes in two products.

    A class, and not a function set on each layer: what is compiled for one layer then serves them all.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PEFT's layer does, ``(..., out_features)``."""
        is_asked_otherwise = args or kwargs or self.disable_adapters or self.merged
        if is_asked_otherwise or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        if self.lora_variant.get(name) is not None or self.lora_B[name].bias is not None:
            return super().forward(x)
        result: Tensor = self.base_layer(x)
        pair = (cast(nn.Linear, part[name]).weight for part in (self.lora_A, self.lora_B))
        down, up = (weight.to(result.dtype) for weight in pair)
        inner = functional.linear(self.lora_dropout[name](x), down)
        rows = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=self.scaling[name])
        return rows.view(result.shape)


def fuse(network: nn.Module) -> None:
    """Have the linear layers of PEFT in a model compute what they compute in two products.

    Layers whose adapter is of a kind of its own (DoRA, with biases) are left to PEFT.
    """
    for module in network.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
