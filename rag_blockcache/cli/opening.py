"""Opening an index from its directory alone: the manifest says with which model and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import IndexMismatchError, StoreError

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.index_records import IndexSettings
    from rag_blockcache.retriever import Retriever


def recorded_settings(directory: Path) -> IndexSettings | None:
    """Return what an index was made with; None if there is no index yet. Nothing is created."""
    from rag_blockcache.manifest import FILE_NAME, Manifest

    if not (directory / FILE_NAME).is_file():  # Manifest would make it
        return None
    with closing(Manifest(directory)) as manifest:
        return manifest.settings


def read_settings(directory: Path) -> IndexSettings:
    """Return what an index was made with.

    Raises:
        StoreError: If there is no index in the directory.
    """
    settings = recorded_settings(directory)
    if settings is None:
        raise StoreError(
            f"there is no index in {directory}; make one with: rag-blockcache index-and-prefill PATH "
            f"--out {directory} --model MODEL --embedder EMBEDDER"
        )
    return settings


@contextmanager
def open_index(
    directory: Path,
    *,
    model: str | None = None,
    embedder: str | None = None,
    device: str | None = None,
    disk_budget_bytes: int | None = None,
) -> Iterator[tuple[BlockCache, Retriever]]:
    """Open the blocks and the passages of an index, and close them in the end.

    Args:
        directory: Of the index.
        model: Where the model is now, if not under the recorded name.
        embedder: Likewise of the embedder.
        device: Where both run, see ``BlockCache``.
        disk_budget_bytes: See ``BlockCache``.

    Raises:
        StoreError: If there is no index in the directory.
        IndexMismatchError: If weights, adapter or dtype are not those that the index was made with.
    """
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

    settings = read_settings(directory)
    cache = BlockCache(
        model or settings.model,
        directory,
        device=device,
        dtype=settings.dtype or None,
        adapter=settings.adapter or None,
        preamble=settings.preamble,
        passage_format=settings.passage_format,
        blocks_see=settings.blocks_see,
        codec=settings.codec,
        disk_budget_bytes=disk_budget_bytes,
    )
    with cache:
        if cache.fingerprint != settings.fingerprint:
            raise IndexMismatchError(
                f"{model or settings.model} is not the model that {directory} was indexed with "
                f"({settings.model}, fingerprint {settings.fingerprint}, this one has {cache.fingerprint}); "
                "name that one with --model, or index into another directory"
            )
        with closing(Retriever(directory / "index", embedder=embedder, device=device)) as retriever:
            yield cache, retriever


def fingerprint_of(
    model: str, *, adapter: str | None, dtype: str | None, device: str | None, codec: str, blocks_see: str
) -> str:
    """Load a model, and return what its blocks are told apart by."""
    from rag_blockcache.block_cache import BlockCache

    cache = BlockCache(
        model, None, adapter=adapter, dtype=dtype, device=device, codec=codec, blocks_see=blocks_see
    )
    with cache:
        return cache.fingerprint
