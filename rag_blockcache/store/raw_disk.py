"""How diskcache keeps a block: its id as it is, its file by name, and nothing that could run."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_BINARY, UNKNOWN

FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.safetensors")


class ForeignEntryError(ValueError):
    """An entry of the index that we would never have written; it is refused unread."""


@dataclass(frozen=True)
class StoredFile:
    """A file that is written and waits for its entry in the index."""

    block_id: str
    name: str
    num_bytes: int
    cost_seconds: float


class RawDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Lets through strings as keys and our own files as values; nothing is ever pickled or unpickled."""

    def put(self, key: Any) -> tuple[str, bool]:
        """Return a block id as it is; any other key would be pickled."""
        if type(key) is not str:
            raise TypeError(f"block ids are strings, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """Return a block id as it is; any other key would be unpickled."""
        if not raw or type(key) is not str:
            raise ForeignEntryError("its key is not a string")
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str, None]:
        """Return what the index keeps of a file that has been written."""
        if not isinstance(value, StoredFile):
            raise TypeError(f"the index takes files that are written already, not {type(value).__name__}")
        return value.num_bytes, MODE_BINARY, value.name, None

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> str:
        """Return the name of the file, unopened, if it is one of ours."""
        if mode != MODE_BINARY or not filename:
            raise ForeignEntryError("its value is not a file of raw bytes")
        self.path(filename)
        return filename

    def remove(self, file_path: str) -> None:
        """Delete a file of ours; its folder stays, since another process may be about to write there."""
        with suppress(FileNotFoundError, ForeignEntryError):  # a planted entry may name any file
            self.path(file_path).unlink()

    def path(self, name: str) -> Path:
        """Return the path of a file of ours, which can only lie inside the directory."""
        if type(name) is str and FILE_NAME.fullmatch(name):
            path = Path(self._directory, name)
            if not path.is_symlink() and not path.parent.is_symlink():
                return path
        raise ForeignEntryError(f"its file name {name!r} is not one of ours")
