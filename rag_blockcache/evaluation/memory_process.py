"""The processes of ``memory``: one encodes, one answers and watches its own memory.

Run as ``python -m rag_blockcache.evaluation.memory_process encode|answer FOLDER``; the folder holds
``request.json`` and takes the result.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from rag_blockcache.errors import ContextTooLongError
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.requests import assemble, block_source, make_plan, store_blocks
from rag_blockcache.evaluation.shapes import open_model
from rag_blockcache.evaluation.token_prompts import TokenPrompt, cut_prompt, token_run
from rag_blockcache.generator import decode, prefill
from rag_blockcache.model import Model
from rag_blockcache.monitor import Monitor
from rag_blockcache.reuse import BLOCK
from rag_blockcache.store import DiskStore, MemoryStore, TieredStore

_FINAL_TOKENS = 50
_MEMORY_TIER_BYTES = 4 * 2**30  # as in ``BlockCache``
_SAMPLE_EVERY_SECONDS = 0.002


class Watch:
    """Follows the resident memory of this process while it is open.

    Attributes:
        start_bytes: Resident at the start.
        peak_bytes: Most that was resident, as the kernel counts it.
        peak_anonymous_bytes: Most private memory, in samples.
        peak_file_bytes: Most memory mapped from files, in samples.
    """

    def __init__(self) -> None:
        self.start_bytes = self.peak_bytes = self.peak_anonymous_bytes = self.peak_file_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, daemon=True)

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back
        self.start_bytes = resident_bytes("status", "VmRSS")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._sample()
        self.peak_bytes = resident_bytes("status", "VmHWM")

    def _sample_on(self) -> None:
        while not self._is_over.wait(_SAMPLE_EVERY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, resident_bytes("status", "RssAnon"))
        self.peak_file_bytes = max(self.peak_file_bytes, resident_bytes("status", "RssFile"))


def resident_bytes(file: str, field: str) -> int:
    """Read one number of this process from ``/proc/self``."""
    for line in Path("/proc/self", file).read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def encode(model: Model, prompt: TokenPrompt, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Store the blocks of the prompt."""
    with DiskStore(folder / "blocks") as disk:
        store_blocks(block_source(model, TieredStore(None, disk)), prompt, BLOCK)
    return {}


def answer(model: Model, prompt: TokenPrompt, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Answer from the stored blocks, as ``BlockCache`` does with its default tiers."""
    on_gpu = model.device.type == "cuda"
    device_loaded = torch.cuda.memory_allocated(model.device) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    weights = {weight.data_ptr(): weight.nbytes for weight in model.network.parameters()}
    with (
        Watch() as watch,
        TieredStore(MemoryStore(_MEMORY_TIER_BYTES), DiskStore(folder / "blocks")) as store,
    ):
        num_new_tokens = _generate(model, prompt, store, request["max_new_tokens"])
        end_anonymous = resident_bytes("smaps_rollup", "Anonymous")
    return {
        "num_tokens": prompt.num_tokens,
        "num_new_tokens": num_new_tokens,
        "weight_bytes": sum(weights.values()),
        "kv_bytes": prompt.num_tokens * model.kv_bytes_per_token,
        "loaded_bytes": watch.start_bytes,
        "peak_bytes": watch.peak_bytes,
        "peak_anonymous_bytes": watch.peak_anonymous_bytes,
        "peak_file_bytes": watch.peak_file_bytes,
        "end_anonymous_bytes": end_anonymous,
        "device_loaded_bytes": device_loaded,
        "device_peak_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
        "environment": dataclasses.asdict(Environment.of(model, request["model"] or request["shape"])),
    }


def _generate(model: Model, prompt: TokenPrompt, store: TieredStore, max_new_tokens: int) -> int:
    source = block_source(model, store)
    plan = make_plan(source, prompt, BLOCK)
    context = assemble(model, plan, source.load(plan))
    logits = prefill(model, context, [plan.computed()])
    [decoded] = decode(
        model,
        context,
        [prompt.token_ids],
        logits,
        max_new_tokens=max_new_tokens,
        monitor=Monitor(),
        options={"do_sample": False},
    )
    return len(decoded.token_ids)


STAGES: dict[str, Callable[[Model, TokenPrompt, dict[str, Any], Path], dict[str, Any]]] = {
    "encode": encode,
    "answer": answer,
}


def main(stage: str, folder: Path) -> None:
    """Run one stage of a request."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    model = open_model(request["model"], request["shape"], device=request["device"], dtype=request["dtype"])
    num_tokens = request["num_tokens"]
    if num_tokens + request["max_new_tokens"] > model.max_length:
        raise ContextTooLongError(
            f"{num_tokens} tokens and {request['max_new_tokens']} new ones exceed the context window of the "
            f"model, {model.max_length}; take a shorter prompt"
        )
    prompt = cut_prompt(
        token_run(model, num_tokens),
        num_tokens,
        final_tokens=_FINAL_TOKENS,
        passage_tokens=request["passage_tokens"],
    )
    found = STAGES[stage](model, prompt, request, folder)
    (folder / f"{stage}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
