"""Looking after an index: what it holds, whether it is whole, and what in it nobody needs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import StoreError
from rag_blockcache.index_records import IndexSettings, ManifestCounts
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.index_report import Failure
from rag_blockcache.jobs.removal import Removal, only_counted
from rag_blockcache.jobs.verification import VerifyReport, check_model, verify
from rag_blockcache.manifest import FILE_NAME, Manifest

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.retriever import Retriever

__all__ = ["GarbageReport", "IndexStatus", "VerifyReport", "collect_garbage", "status", "verify"]

_GROUP = 500
_BLOCK_SUFFIX = ".safetensors"  # databases beside them grow and shrink by themselves


@dataclass(frozen=True)
class GarbageReport:
    """What was deleted, or with ``is_dry_run`` would be.

    Attributes:
        num_passages: Passages that no document holds, of this index or put there by others.
        num_blocks: Blocks that no passage needs any more.
        num_unknown_blocks: Blocks that no job of this index encoded: of questions over other
            passages, or of another model. They stay unless their deletion was asked for.
        num_lost_blocks: Entries whose file had gone; they are encoded again by the next job.
        num_bytes: Space that block files gave back.
        seconds: Time it took.
        is_dry_run: Whether nothing was changed.
    """

    num_passages: int
    num_blocks: int
    num_unknown_blocks: int
    num_lost_blocks: int
    num_bytes: int
    seconds: float
    is_dry_run: bool


def collect_garbage(
    *,
    cache: BlockCache,
    retriever: Retriever,
    manifest: Manifest,
    unknown_blocks: bool = False,
    dry_run: bool = False,
) -> GarbageReport:
    """Delete what no document refers to, and files that belong to nothing.

    No job may be at work on the index meanwhile, so nothing that one has just written is taken for
    garbage. Questions may go on: what they need and do not find is encoded again.

    Args:
        cache: The blocks.
        retriever: The passages.
        manifest: The record; what it refers to stays.
        unknown_blocks: Delete the blocks too that no job of this index encoded.
        dry_run: Only count.

    Raises:
        StoreError: If a job is at work on the index, or nothing was ever indexed into it.
        IndexMismatchError: If the blocks were made with another model than the cache has.
    """
    if manifest.settings is None:
        raise StoreError(f"nothing was indexed into {manifest.path.parent}, so nothing in it is garbage")
    check_model(cache, manifest)
    started, directory = time.perf_counter(), manifest.path.parent
    with index_lock(directory, exclusive=True):
        before = _size_bytes(directory / "blocks", _BLOCK_SUFFIX)
        removal = Removal(cache=cache, retriever=retriever, manifest=manifest)
        num_passages, num_blocks = _count_released(manifest) if dry_run else removal.drop_unused()
        strays, unknown = _unknown_passages(retriever, manifest), _unknown_blocks(cache, manifest)
        num_lost = 0
        if not dry_run:
            removal.delete(strays)
            retriever.save()
            _delete(cache, unknown if unknown_blocks else ())
            num_lost = _drop_lost(cache, manifest)
        num_bytes = before - _size_bytes(directory / "blocks", _BLOCK_SUFFIX)
    return GarbageReport(
        num_passages=num_passages + len(strays),
        num_blocks=num_blocks,
        num_unknown_blocks=len(unknown),
        num_lost_blocks=num_lost,
        num_bytes=max(num_bytes, 0),
        seconds=time.perf_counter() - started,
        is_dry_run=dry_run,
    )


def _count_released(manifest: Manifest) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as directory, closing(manifest.copy_to(directory)) as scratch:
        return only_counted(scratch)


def _unknown_passages(retriever: Retriever, manifest: Manifest) -> list[str]:
    return [
        passage_id
        for group in _groups(retriever)
        for passage_id in sorted(set(group) - manifest.known_passages(group))
    ]


def _unknown_blocks(cache: BlockCache, manifest: Manifest) -> list[str]:
    return [
        block_id
        for group in _groups(cache.store)
        for block_id in sorted(set(group) - manifest.known_blocks(group))
    ]


def _delete(cache: BlockCache, block_ids: Iterable[str]) -> None:
    for block_id in block_ids:
        cache.store.pop(block_id, None)


def _drop_lost(cache: BlockCache, manifest: Manifest) -> int:
    """Delete files without entry, and entries without file; have the latter encoded again."""
    lost = cache.store.disk.repair() if cache.store.disk is not None else []
    manifest.mark_lost(block_ids=lost)
    return len(lost)


def _groups(ids: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(ids)
    while group := list(islice(remaining, _GROUP)):
        yield group


def _size_bytes(directory: Path, suffix: str = "") -> int:
    """Return the size of the files below a directory, of which some may vanish meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            if not name.endswith(suffix):
                continue
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


@dataclass(frozen=True)
class IndexStatus:
    """What an index holds.

    Attributes:
        directory: Where it lies.
        settings: What it was made with; None if nothing was indexed yet.
        counts: Documents, passages and blocks on record, and the work left.
        num_bytes: All files of the index.
        num_block_bytes: Those of the blocks.
        num_index_bytes: Those of passages and vectors.
        failures: Parts of documents that could not become passages.
    """

    directory: Path
    settings: IndexSettings | None
    counts: ManifestCounts
    num_bytes: int
    num_block_bytes: int
    num_index_bytes: int
    failures: tuple[Failure, ...]


def status(directory: Path | str) -> IndexStatus:
    """Tell what an index holds, without loading a model; jobs may be at work on it.

    Raises:
        StoreError: If there is no index in the directory.
    """
    path = Path(directory)
    if not (path / FILE_NAME).is_file():
        raise StoreError(f"there is no index in {path}; make one with index-and-prefill")
    with closing(Manifest(path)) as manifest:
        return IndexStatus(
            directory=path,
            settings=manifest.settings,
            counts=manifest.counts(),
            num_bytes=_size_bytes(path),
            num_block_bytes=_size_bytes(path / "blocks"),
            num_index_bytes=_size_bytes(path / "index"),
            failures=tuple(Failure(*refusal) for refusal in manifest.refusals()),
        )
