"""One block as a file: a safetensors file whose header names the block and the checksum of its tensors.

``docs/on-disk-format.md`` describes the bytes.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rag_blockcache.errors import CorruptBlockError, InvalidInputError
from rag_blockcache.kv_states import KVStates

FORMAT_VERSION = 1
HEADER_BYTES = 4096  # fixed, so that sizes are known before writing, and tensors start on a page of their own
_CODEC = "none"
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stored_bytes(states: KVStates) -> int:
    """Return the size of the file that holds these states, in bytes."""
    return HEADER_BYTES + states.num_bytes


def check_states(block_id: str, states: KVStates) -> None:
    """Refuse keys and values that cannot be stored.

    Raises:
        InvalidInputError: If they differ in shape or type, or are of a type that has no name on disk.
    """
    keys, values = states.keys, states.values
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.ndim != 4:
        raise InvalidInputError(
            f"block {block_id} has keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} "
            f"{values.dtype}; both must be (num_layers, num_kv_heads, num_tokens, head_dim) of one type"
        )
    if keys.dtype not in _DTYPE_NAMES:
        raise InvalidInputError(
            f"block {block_id} is {keys.dtype}; convert it to float32, float16 or bfloat16 to store it"
        )


def write_block(path: Path, block_id: str, states: KVStates) -> None:
    """Write a new file, straight from the memory of the tensors; if that fails, part of it stays.

    Args:
        path: Where to write; must not exist yet, its folder must.
        block_id: Name of the block.
        states: Keys and values that ``check_states`` lets pass, on any device.

    Raises:
        InvalidInputError: If the block id is too long for the header.
        OSError: If the disk is full or the file cannot be written.
    """
    keys, values = _bytes_of(states.keys), _bytes_of(states.values)
    header = _header(block_id, states, _checksum(keys, values))
    with open(path, "xb") as file:
        for part in (header, keys, values):
            file.write(part)


def read_block(path: Path, block_id: str, *, check: bool) -> KVStates:
    """Map a file into memory and check that it holds the block whole.

    The tensors are views of a private mapping: nothing is copied until a page is touched, writing to
    them does not reach the file, and they stay valid when the file is deleted.

    Args:
        path: The file.
        block_id: Name of the block that it must hold.
        check: Read all of it and compare the checksum; otherwise only sizes and header.

    Returns:
        Keys and values on the CPU.

    Raises:
        FileNotFoundError: If there is no such file (any more).
        CorruptBlockError: If the file is truncated, altered, foreign, or holds another block.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            states = KVStates(file.get_tensor("keys"), file.get_tensor("values"))
    except SafetensorError as error:
        raise _corrupt(path, block_id, str(error)) from error
    except RuntimeError:  # torch maps the file by its name, and says no more when it has just been deleted
        if path.exists():
            raise
        raise FileNotFoundError(str(path)) from None
    reason = _mismatch(block_id, metadata, states) or (_damage(metadata, states) if check else None)
    if reason:
        raise _corrupt(path, block_id, reason)
    return states


def request_file(path: Path) -> None:
    """Have the operating system read a file ahead, where it can; a file that is gone is passed over."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as a flat NumPy array; a view, unless they lie apart or elsewhere."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _checksum(keys: Any, values: Any) -> str:
    digest = xxhash.xxh3_128(keys)
    digest.update(values)
    return digest.hexdigest()


def _header(block_id: str, states: KVStates, checksum: str) -> bytes:
    """Return the length of the JSON header and the header itself, padded with spaces to ``HEADER_BYTES``."""
    shape, dtype, num_bytes = list(states.keys.shape), _DTYPE_NAMES[states.dtype], states.keys.nbytes
    description = {
        "__metadata__": {
            "block_id": block_id,
            "checksum": checksum,
            "codec": _CODEC,
            "format_version": str(FORMAT_VERSION),
        },
        "keys": {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]},
        "values": {"dtype": dtype, "shape": shape, "data_offsets": [num_bytes, 2 * num_bytes]},
    }
    text = json.dumps(description, separators=(",", ":")).encode()
    length = HEADER_BYTES - 8
    if len(text) > length:
        raise InvalidInputError(f"block id of {len(block_id)} characters is too long; use a hash of it")
    return length.to_bytes(8, "little") + text.ljust(length)


def _mismatch(block_id: str, metadata: dict[str, str], states: KVStates) -> str | None:
    """Say what in the header is not as ``write_block`` would have written it."""
    expected = {"block_id": block_id, "codec": _CODEC, "format_version": str(FORMAT_VERSION)}
    for name, value in expected.items():
        if metadata.get(name) != value:
            return f"its {name} is {metadata.get(name)!r}, not {value!r}"
    keys, values = states.keys, states.values
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.ndim != 4:
        return f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not belong together"
    return None if keys.dtype in _DTYPE_NAMES else f"its type is {keys.dtype}"


def _damage(metadata: dict[str, str], states: KVStates) -> str | None:
    found, expected = _checksum(_bytes_of(states.keys), _bytes_of(states.values)), metadata.get("checksum")
    return None if found == expected else f"its checksum is {found}, not {expected}"


def _corrupt(path: Path, block_id: str, reason: str) -> CorruptBlockError:
    return CorruptBlockError(
        f"block {block_id} in {os.fspath(path)} is damaged ({reason}); delete it and encode its passage again"
    )
