"""Opening an index for changes: what it was made with must fit, and what was interrupted is settled."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.index_records import AS_ADDED
from rag_blockcache.jobs.index_and_prefill import settings_of
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.named_passages import NamedPassages
from rag_blockcache.jobs.removal import OtherForms
from rag_blockcache.manifest import FILE_NAME, Manifest

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.index_records import IndexSettings
    from rag_blockcache.retriever import Retriever

logger = logging.getLogger(__name__)


def open_manifest(
    directory: Path, *, cache: BlockCache, retriever: Retriever, other_forms: OtherForms, adapter: str
) -> Manifest:
    """Open the manifest of an index that is to be changed; who gets it makes threads take turns.

    Passages that are in the retriever of an index without manifest are recorded, their blocks pending.

    Args:
        directory: Of the index.
        cache: Has the model.
        retriever: Of the index.
        other_forms: As for ``NamedPassages``.
        adapter: Name of the adapter on the model, for the record; empty for none.

    Raises:
        InvalidInputError: If the cache keeps its blocks elsewhere.
        IndexMismatchError: If the index was made with another model or passage format.
        StoreError: If a job is at work that keeps a new index from being opened.
    """
    _check_place(cache, directory)
    with ExitStack() as undo:
        manifest = Manifest(directory, shared_by_threads=True)
        undo.callback(manifest.close)
        settings = _settings(cache, retriever, manifest.settings, adapter)
        manifest.check(settings)
        passages = NamedPassages(cache, retriever, manifest, other_forms)
        _settle(passages, retriever, manifest)
        passages.drop_unused()
        manifest.adopt(settings)
        undo.pop_all()
    return manifest


def check_bare(directory: Path) -> None:
    """Refuse to change an index of a model without it.

    Raises:
        InvalidInputError: If it was written to with a model.
    """
    if not (directory / FILE_NAME).is_file():  # Manifest would make it
        return
    manifest = Manifest(directory)
    settings = manifest.settings
    manifest.close()
    if settings is not None:
        raise InvalidInputError(
            f"the index in {directory} has blocks of {settings.model}, which change with its passages; open "
            "it with that model to add or delete, or only search it"
        )


def _check_place(cache: BlockCache, directory: Path) -> None:
    disk = cache.store.disk
    if disk is None or Path(disk.directory).resolve() != (directory / "blocks").resolve():
        place = "in memory only" if disk is None else f"in {disk.directory}"
        raise InvalidInputError(
            f"the cache keeps its blocks {place}, the index lies in {directory}; give both the same directory"
        )


def _settings(
    cache: BlockCache, retriever: Retriever, recorded: IndexSettings | None, adapter: str
) -> IndexSettings:
    """Say what the index is made with; how texts are split and embedded is the affair of who adds them."""
    found = settings_of(cache, retriever, AS_ADDED)
    if recorded is not None:
        return replace(found, embedder=recorded.embedder, splitting=recorded.splitting)
    return replace(found, model=_absolute(found.model), adapter=_absolute(adapter))


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _settle(passages: NamedPassages, retriever: Retriever, manifest: Manifest) -> None:
    """Settle what was interrupted; in an index without manifest so far, everything."""
    is_new = manifest.settings is None
    names = [*manifest.unfinished_passages(), *(retriever if is_new else ())]
    if not names:
        return
    try:
        with index_lock(manifest.path.parent, exclusive=True):
            passages.settle(names)
    except StoreError as error:
        if is_new:
            raise
        logger.info("%d passages are left for the next opening: %s", len(names), error)
    else:
        logger.info("%d passages of an interrupted call, or of no model, are on record now", len(names))
