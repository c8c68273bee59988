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

from rag_blockcache.errors import CorruptBlockError, InvalidInputError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.quantization import CODECS

FORMAT_VERSION = 1
HEADER_BYTES = 4096  # fixed, so that sizes are known before writing, and tensors start on a page of their own
_MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def stored_bytes(states: BlockStates) -> int:
    """Return the size of the file that holds these states, in bytes."""
    return HEADER_BYTES + states.num_bytes


def check_states(block_id: str, states: BlockStates) -> None:
    """Refuse states that cannot be stored.

    Raises:
        InvalidInputError: If their tensors do not belong together, as those of a block that was cut after it
            was packed, or are of a type that has no name on disk.
    """
    if not states.is_sound:
        raise InvalidInputError(
            f"block {block_id} has {_described(states)}; keys and values must be (num_layers, num_kv_heads, "
            "num_tokens, head_dim) of one type, and what they are packed in as the codec made it"
        )
    if states.dtype not in _MODEL_DTYPES:
        raise InvalidInputError(
            f"block {block_id} is {states.dtype}; convert it to float32, float16 or bfloat16 to store it"
        )


def write_block(path: Path, block_id: str, states: BlockStates) -> None:
    """Write a new file, straight from the memory of the tensors; if that fails, part of it stays.

    Args:
        path: Where to write; must not exist yet, its folder must.
        block_id: Name of the block.
        states: What ``check_states`` lets pass, on any device.

    Raises:
        InvalidInputError: If the block id is too long for the header.
        OSError: If the disk is full or the file cannot be written.
    """
    parts = _parts(states)
    header = _header(block_id, states, _checksum(parts))
    with open(path, "xb") as file:
        for part in (header, *parts):
            file.write(part)


def read_block(path: Path, block_id: str, *, check: bool) -> BlockStates:
    """Map a file into memory and check that it holds the block whole.

    The tensors are views of a private mapping: nothing is copied until a page is touched, writing to
    them does not reach the file, and they stay valid when the file is deleted.

    Args:
        path: The file.
        block_id: Name of the block that it must hold.
        check: Read all of it and compare the checksum; otherwise only sizes and header.

    Returns:
        The states on the CPU, as their codec keeps them.

    Raises:
        FileNotFoundError: If there is no such file (any more).
        CorruptBlockError: If the file is truncated, altered, foreign, or holds another block.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = sorted(file.keys())
            if reason := _mismatch(block_id, metadata, names):
                raise _corrupt(path, block_id, reason)
            states = CODECS[metadata["codec"]](**{name: file.get_tensor(name) for name in names})
    except SafetensorError as error:
        raise _corrupt(path, block_id, str(error)) from error
    except RuntimeError:  # torch maps the file by its name, and says no more when it has just been deleted
        if path.exists():
            raise
        raise FileNotFoundError(str(path)) from None
    if reason := _unsound(states) or (_damage(metadata, states) if check else None):
        raise _corrupt(path, block_id, reason)
    return states


def request_file(path: Path) -> None:
    """Have the operating system read a file ahead, where it can; a file that is gone is passed over."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _parts(states: BlockStates) -> list[Any]:
    """Return the bytes of each tensor as a flat NumPy array; a view, unless they lie apart or elsewhere."""
    return [
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for tensor in states.tensors().values()
    ]


def _checksum(parts: list[Any]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _header(block_id: str, states: BlockStates, checksum: str) -> bytes:
    """Return the length of the JSON header and the header itself, padded with spaces to ``HEADER_BYTES``."""
    metadata = {
        "block_id": block_id,
        "checksum": checksum,
        "codec": states.codec,
        "format_version": str(FORMAT_VERSION),
    }
    description: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in states.tensors().items():
        start, end = end, end + tensor.nbytes
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        description[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(description, separators=(",", ":")).encode()
    length = HEADER_BYTES - 8
    if len(text) > length:
        raise InvalidInputError(f"block id of {len(block_id)} characters is too long; use a hash of it")
    return length.to_bytes(8, "little") + text.ljust(length)


def _mismatch(block_id: str, metadata: dict[str, str], names: list[str]) -> str | None:
    """Say what in the header is not as ``write_block`` would have written it."""
    codec = metadata.get("codec")
    if codec not in CODECS:
        return f"its codec is {codec!r}, which this release does not know"
    expected = {"block_id": block_id, "format_version": str(FORMAT_VERSION)}
    for name, value in expected.items():
        if metadata.get(name) != value:
            return f"its {name} is {metadata.get(name)!r}, not {value!r}"
    if names != sorted(CODECS[codec].names()):
        return f"its tensors are {', '.join(names)}, not those of codec {codec}"
    return None


def _unsound(states: BlockStates) -> str | None:
    if not states.is_sound:
        return f"{_described(states)} do not belong together"
    return None if states.dtype in _MODEL_DTYPES else f"its type is {states.dtype}"


def _described(states: BlockStates) -> str:
    return ", ".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in states.tensors().items()
    )


def _damage(metadata: dict[str, str], states: BlockStates) -> str | None:
    found, expected = _checksum(_parts(states)), metadata.get("checksum")
    return None if found == expected else f"its checksum is {found}, not {expected}"


def _corrupt(path: Path, block_id: str, reason: str) -> CorruptBlockError:
    return CorruptBlockError(
        f"block {block_id} in {os.fspath(path)} is damaged ({reason}); delete it and encode its passage again"
    )
