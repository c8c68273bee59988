"""An archive into an index: nothing but plain files of an index, each against its checksum."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

from rag_blockcache.errors import StoreError
from rag_blockcache.index_records import IndexSettings
from rag_blockcache.jobs.archive_file import (
    CHECKSUMS,
    DESCRIPTION,
    FORMAT,
    FORMAT_VERSION,
    extract,
    members,
    read_json,
)
from rag_blockcache.jobs.progress import JobProgress, ProgressCallback


def read_settings(tar: tarfile.TarFile, archive: Path) -> IndexSettings:
    """Read from the description, which comes first, what the index was made with.

    Raises:
        StoreError: If the archive is foreign or of another format version.
    """
    member = tar.next()
    described = read_json(tar, member) if member is not None and member.name == DESCRIPTION else None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise StoreError(f"{archive} is not an archive of an index; use a file that the export command wrote")
    if described.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{archive} has format version {described.get('version')}, this rag_blockcache reads "
            f"{FORMAT_VERSION}; install the version that wrote it, or export it again"
        )
    try:
        return IndexSettings.from_record(described["settings"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"the description in {archive} cannot be read ({error}); export it again") from error


def read_index(
    tar: tarfile.TarFile, directory: Path, archive: Path, *, progress: ProgressCallback | None = None
) -> tuple[int, int]:
    """Unpack what follows the description, and check it against the checksums.

    Returns:
        The numbers of files and of their bytes.

    Raises:
        StoreError: If a file is damaged, missing, unlisted, or none of an index.
    """
    found: dict[str, str] = {}
    num_files, num_bytes, started = 0, 0, time.perf_counter()
    for member in members(tar):
        if member.name != CHECKSUMS:
            found[member.name] = extract(tar, member, directory)
            num_files, num_bytes = num_files + 1, num_bytes + member.size
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(JobProgress("import", num_files, num_bytes=num_bytes, seconds=seconds))
        elif _is_last(read_json(tar, member), found, archive):
            return num_files, num_bytes
        else:
            found = {}
    raise StoreError(f"{archive} ends too early; copy it again")


def _is_last(listed: object, found: dict[str, str], archive: Path) -> bool:
    """Check the files since the last list against this one."""
    expected = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(listed, dict) or not isinstance(expected, dict) or found.keys() != expected.keys():
        raise StoreError(f"{archive} does not hold the files that it lists; copy or export it again")
    damaged = sorted(name for name, checksum in found.items() if expected[name] != checksum)
    if damaged:
        raise StoreError(
            f"{', '.join(damaged[:3])} in {archive} is damaged; copy or export the archive again"
        )
    return bool(listed.get("is_last"))
