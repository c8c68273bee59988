"""The engines of a comparison: one for each kind of encoding, all over one loaded model."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.evaluation.arms import FULL_ARM, Arm
from rag_blockcache.evaluation.unmoved import UnmovedBlockCache


class Engines:
    """Opens a ``BlockCache`` for each kind of encoding that arms ask for; arms of one kind share its blocks.

    Blocks are in memory only, without a bound: whoever measures deletes what is no longer needed.

    Args:
        model: Hub id, folder, or loaded model, as for ``BlockCache``.
        **options: Further arguments of ``BlockCache``, the same for all arms. Blocks see themselves alone
            where an arm says nothing else.

    Attributes:
        plain: The engine of arms without options of their own.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        options = {"blocks_see": "themselves", **options}
        self.plain = _warm(
            BlockCache(model, None, memory_budget_bytes=None, context_budget_bytes=0, **options)
        )
        loading = {"tokenizer", "device", "dtype", "adapter"}  # done once
        self._options = {name: value for name, value in options.items() if name not in loading}
        self._by_kind: dict[str, BlockCache] = {FULL_ARM.engine: self.plain}

    def of(self, arm: Arm) -> BlockCache:
        """Return the engine of an arm, opened when it is first asked for."""
        if arm.engine not in self._by_kind:
            kind = BlockCache if arm.moves_keys else UnmovedBlockCache
            opened = kind(
                self.plain.model.network,
                None,
                tokenizer=self.plain.tokenizer,
                memory_budget_bytes=None,
                context_budget_bytes=0,  # every question is timed as if it were the first
                **{**self._options, **arm.options},
            )
            self._by_kind[arm.engine] = _warm(opened)
        return self._by_kind[arm.engine]

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self._by_kind.values():
            engine.close()


def _warm(cache: BlockCache) -> BlockCache:
    """Let an engine encode its preamble, so that the first prompts find it as all others do."""
    cache.first_logits("?", ["?"], policy="block")
    cache.forget(["?"])
    return cache
