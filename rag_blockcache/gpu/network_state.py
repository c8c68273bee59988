"""What a captured pass depends on beside its inputs: which modules run, with which weights and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_Tensors = Mapping[str, Tensor | None]


class NetworkState:
    """Notices when weights of a network are replaced, modules exchanged, or adapters or hooks switched.

    Weights that are changed in place are read where they are. It is asked before every pass, so it looks at
    addresses, not at numbers.

    Args:
        network: The network, as it is now.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        self._children = [(module._modules, [*map(id, module._modules.values())]) for module in modules]
        owners: list[_Tensors] = [
            held for module in modules for held in (module._parameters, module._buffers) if held
        ]
        self._tensors = [(held, _addresses(held)) for held in owners]
        self._hooks = [
            hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._adapters: list[Any] = [module for module in modules if "merged_adapters" in module.__dict__]
        self._adapters_used = self._uses()
        self.has_hooks = any(self._hooks) or any("forward" in module.__dict__ for module in modules)

    def is_current(self) -> bool:
        """Return whether the network runs the same modules with the same weights still."""
        return (
            all([*map(id, children.values())] == known for children, known in self._children)
            and all(_addresses(held) == known for held, known in self._tensors)
            and any(self._hooks) == self.has_hooks
            and self._uses() == self._adapters_used
        )

    def _uses(self) -> list[Any]:
        return [
            (list(module.active_adapters), bool(module.disable_adapters), list(module.merged_adapters))
            for module in self._adapters
        ]


def _addresses(tensors: _Tensors) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
