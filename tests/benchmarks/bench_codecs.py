"""Bytes of a block on disk, and the time to assemble a context, by codec and length of a block.

    python tests/benchmarks/bench_codecs.py

What: for each length, blocks of 8,000 tokens in all are kept by every codec, in memory and on disk. A
context is looked up, allocated and filled (dequantized, turned, placed) from memory; from disk with the
files in the page cache and checked before; and from disk with the files thrown out of the page cache. All
codecs and places take turns, seven rounds after one to warm up; medians, and ratios to the exact codec
within a round. Bytes are those of the files, headers included. Packing is what a codec adds to encoding.
The shape is that of SmolLM2-135M, in bfloat16, unless options say otherwise.

How it can mislead: states and weights are random, which changes neither bytes nor times, and says nothing
of answers: ``codec_quality.py`` measures what a codec loses. The page cache of a hypervisor, or the disk's
own memory, may still hold files that this system has thrown out. Assembly is one part of the time to first
token; ``bench_latency.py`` has the others.

Others: ``--shape llama-3.2-1b --num-tokens 2000 --lengths 100 --repeats 5``.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch

from rag_blockcache.assembler import Context
from rag_blockcache.evaluation import page_cache
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.shapes import SHAPES, open_model
from rag_blockcache.evaluation.stopwatch import in_turn, ratios
from rag_blockcache.kv_states import KVStates, Placement
from rag_blockcache.quantization import CODECS
from rag_blockcache.store import DiskStore, MemoryStore

COLUMNS = {
    "num_block_tokens": "tokens a block",
    "codec": "codec",
    "file_bytes": "a block on disk",
    "percent_of_exact": "bytes, % of exact",
    "memory_seconds": "assembled from memory",
    "disk_seconds": "from disk, warm",
    "disk_cold_seconds": "from disk, cold",
    "memory_times_exact": "memory: times exact",
    "disk_times_exact": "warm disk: times exact",
    "disk_cold_times_exact": "cold disk: times exact",
    "pack_seconds": "packing 1,000 tokens",
}
STILL_CACHED = 0.02  # a disk is cold if no more than this share of the files is in the page cache


def assemble(model, store, names, num_tokens, before=lambda: None) -> float:
    """Return the seconds from the names of blocks to a context that holds them."""
    before()
    begin = time.perf_counter()
    states = store.get_many(names)
    context = Context(model, [num_tokens])
    offsets = range(0, num_tokens, num_tokens // len(names))
    context.place(
        0, [Placement(states[name], at) for name, at in zip(names, offsets, strict=True)], num_tokens
    )
    return time.perf_counter() - begin


def measure(model, length: int, num_tokens: int, repeats: int, folder: Path) -> list[dict[str, object]]:
    """Measure all codecs with blocks of one length."""
    names = [str(number) for number in range(max(1, num_tokens // length))]
    shape = (2, model.num_layers, model.num_kv_heads, length, model.head_dim)
    blocks = [KVStates(*torch.randn(shape).to(model.dtype)) for _ in names]
    runs, sizes, packing = {}, {}, {}
    with ExitStack() as stack:
        for codec, form in CODECS.items():
            begin = time.perf_counter()
            packed = dict(zip(names, map(form.pack, blocks), strict=True))
            packing[codec] = (time.perf_counter() - begin) / (len(names) * length) * 1000
            memory, disk = MemoryStore(), stack.enter_context(DiskStore(folder / f"{codec}-{length}"))
            memory.put_many(packed)
            disk.put_many(packed)
            files = page_cache.block_files(disk.directory)
            sizes[codec] = files[0].stat().st_size
            run = partial(assemble, model, names=names, num_tokens=len(names) * length)
            runs[codec, "memory"] = partial(run, memory)
            runs[codec, "disk"] = partial(run, disk)
            page_cache.drop(files)
            if page_cache.cached_share(files) <= STILL_CACHED:
                runs[codec, "disk_cold"] = partial(run, disk, before=partial(page_cache.drop, files))
        _, found = in_turn(runs, repeats)
    rows = []
    for codec in CODECS:
        row = {
            "num_block_tokens": length,
            "codec": codec,
            "file_bytes": sizes[codec],
            "percent_of_exact": 100 * sizes[codec] / sizes["none"],
            "pack_seconds": packing[codec] if codec != "none" else None,
        }
        for place in ("memory", "disk", "disk_cold"):
            seconds = found.get((codec, place))
            exact = found.get(("none", place))
            row[f"{place}_seconds"] = median(seconds) if seconds else None
            row[f"{place}_times_exact"] = ratios(seconds, exact).median if seconds and exact else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what codecs save on disk and cost at assembly.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 256, 512])
    parser.add_argument("--num-tokens", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where blocks go, on the disk to measure")
    options = parser.parse_args()
    model = open_model(None, options.shape)
    rows = []
    for length in options.lengths:
        with tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-", dir=options.folder) as folder:
            rows += measure(model, length, options.num_tokens, options.repeats, Path(folder))
        for row in rows[-len(CODECS) :]:
            print({COLUMNS[key]: value for key, value in row.items()}, flush=True)
    environment = asdict(Environment.of(model, f"shape of {options.shape}"))
    command = " ".join(["python tests/benchmarks/bench_codecs.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **environment, "columns": COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
