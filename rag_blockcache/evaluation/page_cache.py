"""The operating system's page cache: files thrown out of it, so that the next read comes from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def block_files(directory: Path) -> list[Path]:
    """Return the block files of a store, without its index."""
    return sorted(directory.rglob("*.safetensors"))


def sync(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop(paths: Iterable[Path]) -> None:
    """Ask for files to be thrown out of the page cache; what is mapped or on a RAM disk stays.

    Where the system has no such call (macOS), nothing happens; ``cached_share`` tells.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    paths = list(paths)
    sync(paths)  # a page that was never written cannot go
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_share(paths: Iterable[Path]) -> float:
    """Return how much of some files is in the page cache, 0 to 1; 1 where that cannot be told.

    Other processes' memory, a hypervisor, or the disk itself may hold copies of which this knows nothing.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mincore"):
        return 1.0
    counts = [_count(library, path) for path in paths if path.stat().st_size]
    return sum(cached for cached, _ in counts) / max(sum(pages for _, pages in counts), 1)


def _count(library: ctypes.CDLL, path: Path) -> tuple[int, int]:
    """Return how many pages of a file are cached, and how many there are."""
    num_bytes = path.stat().st_size
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    # A private mapping that may be written to: ctypes gives no address of a read-only one.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        is_cached = (ctypes.c_ubyte * num_pages)()
        start = (ctypes.c_char * num_bytes).from_buffer(mapped)
        failed = library.mincore(ctypes.byref(start), ctypes.c_size_t(num_bytes), is_cached)
        del start  # the mapping cannot be closed before
    return (num_pages if failed else sum(page & 1 for page in is_cached)), num_pages
