"""Peak memory of one answer over a long prompt from disk, in a process of its own.

What is counted: pages resident in the process, private memory and mapped files alike, so that keys and values
read as a memory map count as much as copied ones. The kernel keeps the exact peak (``VmHWM``, set back when
the model is loaded); what part of it was mapped files is sampled every few milliseconds. ``ru_maxrss`` would
say less: it keeps the peak of loading, and even that of the parent process.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_blockcache import errors
from rag_blockcache.evaluation.places import scratch_folder

ALLOWED_KV_MULTIPLE = 2.2  # once on its way from disk, once in the context, and a fifth to work with


@dataclass(frozen=True)
class MemoryMeasure:
    """Memory of one answer.

    Attributes:
        num_tokens: Length of the prompt.
        num_new_tokens: Tokens generated after it.
        weight_bytes: The model's weights.
        kv_bytes: Keys and values of the prompt.
        loaded_bytes: Resident when the model was loaded, before the request: weights, Python, torch.
        peak_bytes: Most that was resident while the request was answered.
        peak_anonymous_bytes: Most private memory, in samples.
        peak_file_bytes: Most memory mapped from files, in samples: weights, libraries, blocks.
        end_anonymous_bytes: Private memory when the answer was done (``smaps_rollup``).
        device_loaded_bytes: Allocated on the GPU before the request; None without one.
        device_peak_bytes: Most while it was answered; None likewise.
        environment: Where this was measured.
    """

    num_tokens: int
    num_new_tokens: int
    weight_bytes: int
    kv_bytes: int
    loaded_bytes: int
    peak_bytes: int
    peak_anonymous_bytes: int
    peak_file_bytes: int
    end_anonymous_bytes: int
    device_loaded_bytes: int | None
    device_peak_bytes: int | None
    environment: dict[str, Any]

    @property
    def kv_multiple(self) -> float:
        """What the answer took beyond the loaded model, in multiples of its keys and values."""
        return (self.peak_bytes - self.loaded_bytes) / self.kv_bytes

    @property
    def is_within_bound(self) -> bool:
        """Whether that is at most ``ALLOWED_KV_MULTIPLE``."""
        return self.kv_multiple <= ALLOWED_KV_MULTIPLE

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, and as ``rows`` what a table of it shows."""
        found = dataclasses.asdict(self)
        columns = {
            "num_tokens": "prompt tokens",
            "loaded_bytes": "model loaded",
            "kv_bytes": "keys and values",
            "peak_bytes": "peak",
            "kv_multiple": "beyond the model, times keys and values",
        }
        row = {"kv_multiple": self.kv_multiple, **{key: found[key] for key in columns if key in found}}
        allowed = {"allowed_kv_multiple": ALLOWED_KV_MULTIPLE, "is_within_bound": self.is_within_bound}
        return {**found.pop("environment"), "columns": columns, "rows": [row], **found, **allowed}


def measure_memory(
    model: str | None = None,
    *,
    shape: str | None = None,
    num_tokens: int = 8000,
    passage_tokens: int = 100,
    max_new_tokens: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    directory: Path | str | None = None,
) -> MemoryMeasure:
    """Answer over a long prompt whose blocks are on disk, in a fresh process, and report its peak memory.

    One process encodes the blocks, another one answers.

    Args:
        model: Hub id or folder.
        shape: A random model instead, see ``shapes``.
        num_tokens: Length of the prompt; its final block has 50 tokens.
        passage_tokens: Tokens of a passage, about.
        max_new_tokens: Tokens to generate.
        device: See ``open_model``.
        dtype: See ``open_model``.
        directory: Blocks are stored in it while this runs; None takes a place for temporary files.

    Raises:
        InvalidInputError: If this system does not tell what is resident (``/proc``), or the arguments
            cannot be used.
        RagBlockCacheError: If a process fails; the message has the last line it wrote.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise errors.InvalidInputError(
            "peak memory is read from /proc, which this system lacks; measure on Linux"
        )
    with scratch_folder(directory) as folder:
        request = {
            "model": model,
            "shape": shape,
            "num_tokens": num_tokens,
            "passage_tokens": passage_tokens,
            "max_new_tokens": max_new_tokens,
            "device": device,
            "dtype": dtype,
        }
        _run("encode", request, Path(folder))
        return MemoryMeasure(**_run("answer", request, Path(folder)))


def _run(stage: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one stage in a process of its own, and return what it found."""
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "rag_blockcache.evaluation.memory_process", stage, str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        kind, _, reason = last.partition(": ")
        if kind.startswith(f"{errors.__name__}."):  # raised on purpose: as if it had been raised here
            raise getattr(errors, kind.rpartition(".")[2])(reason)
        raise errors.RagBlockCacheError(f"the process to {stage} blocks ended badly: {last}")
    found: dict[str, Any] = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    return found
