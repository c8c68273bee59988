"""Linear layers with an adapter, in fewer passes over the activations than PEFT takes.

PEFT keeps the weights of an adapter in float32 and brings activations there and back, scales what comes out
and adds it, each a pass of its own. Over long rows and small layers these passes are most of a step.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


def fuse(network: nn.Module) -> None:
    """Have the linear layers of PEFT in a model compute what they compute in two products.

    Layers whose adapter is of a kind of its own (DoRA, with biases) are left to PEFT.
    """
    for module in network.modules():
        if type(module) is Linear:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    is_asked_otherwise = args or kwargs or layer.disable_adapters or layer.merged
    if is_asked_otherwise or len(layer.active_adapters) != 1:
        return Linear.forward(layer, x, *args, **kwargs)
    [name] = layer.active_adapters
    if layer.lora_variant.get(name) is not None or layer.lora_B[name].bias is not None:
        return Linear.forward(layer, x)
    result: Tensor = layer.base_layer(x)
    down, up = (cast(nn.Linear, part[name]).weight.to(result.dtype) for part in (layer.lora_A, layer.lora_B))
    inner = functional.linear(layer.lora_dropout[name](x), down)
    rows = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=layer.scaling[name])
    return rows.view(result.shape)
