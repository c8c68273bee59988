"""Embedder: texts to unit vectors, with a sentence-transformers model or any callable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rag_blockcache.errors import InvalidInputError, ModelNotFoundError

Vectors: TypeAlias = NDArray[np.float32]  # (num_texts, dimension), rows of length one
EmbedFunction: TypeAlias = Callable[[list[str]], ArrayLike]

logger = logging.getLogger(__name__)


class Embedder:
    """Texts to vectors of length one, so that an inner product is a cosine.

    A model is loaded at the first text, not before: opening an index to look at its passages
    costs nothing. What is on this machine is tried first, without the network.

    Args:
        embedder: Name or local path of a sentence-transformers model, or a callable that takes
            a list of strings and returns ``(num_texts, dimension)``.
        device: Where the model runs, ``"cuda"`` say; None leaves it to sentence-transformers.
            A callable sees to that itself.
        batch_size: Texts per call of the model or callable.
    """

    def __init__(
        self, embedder: str | EmbedFunction, *, device: str | None = None, batch_size: int = 64
    ) -> None:
        if not (callable(embedder) or (isinstance(embedder, str) and embedder.strip())):
            raise InvalidInputError(
                f"embedder is {embedder!r}; pass the name or path of a sentence-transformers model, or a "
                "callable that takes a list of strings and returns one vector each"
            )
        if batch_size < 1:
            raise InvalidInputError(f"batch_size is {batch_size}; it must be at least 1")
        self._embedder = embedder
        self._device = device
        self._batch_size = batch_size
        self._model: Any = None
        self._loading = threading.Lock()

    @property
    def name(self) -> str:
        """Name of the model, absolute where it is a path; of a callable, where it is defined."""
        if isinstance(self._embedder, str):
            return str(Path(self._embedder).resolve()) if Path(self._embedder).is_dir() else self._embedder
        function = self._embedder if hasattr(self._embedder, "__qualname__") else type(self._embedder)
        return f"callable {function.__module__}.{function.__qualname__}"

    @property
    def is_callable(self) -> bool:
        """Whether the user's own callable does the work, not a model that is loaded by name."""
        return not isinstance(self._embedder, str)

    def embed(
        self,
        texts: Sequence[str],
        *,
        is_query: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vectors:
        """Embed texts in batches of similar length, so that little of a batch is padding.

        Args:
            texts: What to embed; at least one.
            is_query: Whether these are questions; some models put another prompt before them.
            progress: Called after each batch with the numbers of texts done and in all.

        Returns:
            ``(num_texts, dimension)``, float32, in the order of ``texts``.

        Raises:
            ModelNotFoundError: If the model cannot be loaded.
            InvalidInputError: If the callable returns something else than one finite vector a text.
        """
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        batches: list[Vectors] = []
        for start in range(0, len(texts), self._batch_size):
            batch = [texts[index] for index in by_length[start : start + self._batch_size]]
            batches.append(unit_vectors(self._encode(batch, is_query), num_vectors=len(batch)))
            if progress is not None:
                progress(start + len(batch), len(texts))
        vectors = np.empty((len(texts), batches[0].shape[1]), np.float32)
        vectors[by_length] = np.concatenate(batches)
        return vectors

    def _encode(self, texts: list[str], is_query: bool) -> ArrayLike:
        if not isinstance(self._embedder, str):
            return self._embedder(texts)
        with self._loading:
            if self._model is None:
                self._model = _load(self._embedder, self._device)
        # Older releases know no roles, and models without prompts treat both alike.
        encode = getattr(self._model, "encode_query" if is_query else "encode_document", self._model.encode)
        vectors: ArrayLike = encode(texts, batch_size=self._batch_size, show_progress_bar=False)
        return vectors


def unit_vectors(vectors: ArrayLike, *, num_vectors: int) -> Vectors:
    """Scale vectors to length one; a zero vector stays as it is and is similar to nothing.

    Raises:
        InvalidInputError: If the shape is not ``(num_vectors, dimension)`` or a number is not finite.
    """
    if hasattr(vectors, "detach"):  # a tensor, perhaps on another device
        vectors = vectors.detach().float().cpu().numpy()
    found = np.asarray(vectors, dtype=np.float64)
    if found.ndim != 2 or len(found) != num_vectors or found.shape[1] == 0:
        raise InvalidInputError(
            f"embeddings have shape {found.shape}, but {num_vectors} texts need ({num_vectors}, dimension); "
            "return one vector for each text, in their order"
        )
    if not np.isfinite(found).all():
        bad = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise InvalidInputError(f"embedding {bad} holds numbers that are not finite; check the embedder")
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    unit: Vectors = (found / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return unit


def _load(name: str, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer  # takes seconds, so only when needed

    logger.info("loading embedder %s", name)
    try:
        return SentenceTransformer(name, device=device, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise ModelNotFoundError(
                f"the embedder in {name} cannot be loaded ({_first_line(error)}); it needs a folder that "
                "SentenceTransformer.save wrote"
            ) from error
    try:
        return SentenceTransformer(name, device=device)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"embedder {name} is neither on this machine nor to be had from the hub ({_first_line(error)}); "
            "check the name, download it first, or pass the path of a local model"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
