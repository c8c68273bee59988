"""One BlockCache for all who ask for the same: cheap handles that load it when it is first needed."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rag_blockcache.answers import Answer, AnswerStream
from rag_blockcache.async_answers import AsyncAnswerStream
from rag_blockcache.block_cache import BlockCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.loading import ModelCard, model_card
from rag_blockcache.passages import Passage
from rag_blockcache.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Arguments = tuple[Any, ...]
_lock = threading.Lock()
_slots: weakref.WeakValueDictionary[_Arguments, _Slot] = weakref.WeakValueDictionary()


class _Slot:
    """Where the handles with equal arguments find their cache."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cache: BlockCache | None = None

    def __del__(self) -> None:
        if self.cache is not None:
            self.cache.close()


class SharedCache:
    """A handle on a ``BlockCache`` that is loaded when it is first needed, once a process.

    Handles with equal arguments are equal, and share one cache as long as one of them is alive. Making a
    handle costs nothing, so frameworks may make and copy them as they like; a copy never copies a model. A
    handle that names its model may be pickled, and in another process opens a cache of its own there. All
    methods may be called from any thread.

    Args:
        model: As for ``BlockCache``. A loaded model is equal to itself alone.
        directory: As for ``BlockCache``.
        **options: As for ``BlockCache``. Checked when the cache is loaded.

    Example:
        >>> handles = [SharedCache(tiny_model, None, tokenizer=tiny_tokenizer) for _ in range(2)]
        >>> handles[0].get() is handles[1].get()
        True
    """

    def __init__(
        self, model: str | Path | PreTrainedModel, directory: str | Path | None, **options: Any
    ) -> None:
        place = None if directory is None else os.path.abspath(directory)
        self._model, self._directory, self._options = model, place, options
        chosen = {**_defaults(), **options}  # an option that is spelled out may be the one by default
        named = (_identity(model), place, *((name, _identity(chosen[name])) for name in sorted(chosen)))
        with _lock:
            slot = _slots.get(named)
            if slot is None:
                slot = _slots[named] = _Slot()
        self._slot = slot

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedCache) and self._slot is other._slot

    def __hash__(self) -> int:
        return hash(id(self._slot))

    def __copy__(self) -> Self:
        return self  # nothing of a handle ever changes

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        loaded = [each for each in (self._model, self._options.get("tokenizer")) if _is_loaded(each)]
        if loaded:
            raise InvalidInputError(
                f"a handle on a loaded {type(loaded[0]).__name__} cannot be pickled, since another process "
                "would need a copy of it; name model and tokenizer by hub id or folder, and it can"
            )
        return _made, (self._model, self._directory, self._options)

    def get(self) -> BlockCache:
        """Return the cache, loading it if no handle has done so; whoever asks meanwhile waits.

        Raises:
            RagBlockCacheError: As ``BlockCache`` does.
        """
        with self._slot.lock:
            if self._slot.cache is None:
                self._slot.cache = BlockCache(self._model, self._directory, **self._options)
            return self._slot.cache

    @property
    def is_loaded(self) -> bool:
        """Whether some handle has loaded the cache."""
        return self._slot.cache is not None

    @property
    def model_name(self) -> str:
        """Name of the model, as it was given or as it says of itself."""
        return str(self._model) if isinstance(self._model, str | Path) else str(self._model.name_or_path)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded without the weights."""
        return self._card.tokenizer

    @property
    def context_window(self) -> int:
        """Most tokens that prompt and answer may have together; known without the weights."""
        return self._card.max_length

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template; known without the weights."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def _card(self) -> ModelCard:
        cache = self._slot.cache
        if cache is not None:
            return ModelCard(cache.tokenizer, cache.model.max_length)
        return model_card(self._model, self._options.get("tokenizer"))

    def answer(self, request: Request, **options: Any) -> Answer:
        """See ``BlockCache.answer``."""
        return self.get().answer(request, **options)

    def answer_batch(self, requests: Sequence[Request], **options: Any) -> list[Answer]:
        """See ``BlockCache.answer_batch``."""
        return self.get().answer_batch(requests, **options)

    def stream_answer(self, request: Request, **options: Any) -> AnswerStream:
        """See ``BlockCache.stream_answer``."""
        return self.get().stream_answer(request, **options)

    async def aanswer(self, request: Request, **options: Any) -> Answer:
        """See ``BlockCache.aanswer``; loading the model does not keep the event loop either."""
        return await self.astream_answer(request, in_pieces=False, **options).whole()

    def astream_answer(self, request: Request, **options: Any) -> AsyncAnswerStream:
        """See ``BlockCache.astream_answer``."""
        return AsyncAnswerStream(lambda: self.stream_answer(request, **options))

    def prefetch(self, passages: Iterable[str | Passage]) -> Future[int] | None:
        """See ``BlockCache.prefetch``; None, and nothing is loaded, where nobody has loaded the cache."""
        cache = self._slot.cache
        return None if cache is None else cache.prefetch(passages)

    def close(self) -> None:
        """Close the cache for all handles; the next to need it loads it again."""
        with self._slot.lock:
            cache, self._slot.cache = self._slot.cache, None
        if cache is not None:
            cache.close()


def _made(model: str | Path, directory: str | None, options: dict[str, Any]) -> SharedCache:
    return SharedCache(model, directory, **options)


def _is_loaded(given: Any) -> bool:
    """Say whether a model or tokenizer came as an object, not by its name."""
    return not isinstance(given, str | Path | None)


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    parameters = inspect.signature(BlockCache.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _identity(value: Any) -> Any:
    """Return something hashable that two values share if they mean the same."""
    if isinstance(value, Path):
        return str(value)
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
