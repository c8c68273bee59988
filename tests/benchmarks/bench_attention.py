"""Attention of a final block, and of repaired tokens, over a long context: the fused kernel and products.

    python tests/benchmarks/bench_attention.py

What: one layer's attention in bfloat16, in the shape of SmolLM2-135M, over keys and values that lie in a
larger buffer, as those of a context do. Twelve layers of them are gone through in turn, so that none is in
the caches of the cores from the time before. Both ways take turns; ratios are within a round. The distance is
to attention in float64 over the same numbers.

How it can mislead: keys and queries are random, and larger than those of a model; on a CPU that does not
multiply bfloat16 itself, the library does not take this way, and it is measured nevertheless.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict

import torch
from language_reference import smollm2_path
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_blockcache import bfloat16_attention
from rag_blockcache.attention import _masked_attention
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.loading import load_model

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
NUM_LAYERS = 12
ROOM = 64  # slots behind those in use
SHAPES = (  # queries, slots, whether they are spread
    *((50, slots, False) for slots in (512, 1024, 2048, 4096, 8000)),
    *((slots // 5, slots, True) for slots in (2048, 8000)),
)
COLUMNS = {
    "queries": "queries",
    "num_slots": "slots",
    "fused_seconds": "fused kernel",
    "products_seconds": "products",
    "ratio": "products: times the fused kernel",
    "fused_error": "fused kernel: distance, %",
    "products_error": "products: distance, %",
    "is_taken": "taken",
}


def states(num_heads: int, num_tokens: int) -> Tensor:
    return 2 * torch.randn(1, num_heads, num_tokens + ROOM, HEAD_DIM).to(torch.bfloat16)[:, :, :num_tokens]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    keys, values = (
        each.double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for each in (key, value)
    )
    return scaled_dot_product_attention(query.double(), keys, values, attn_mask=mask).transpose(1, 2)


def measure(num_queries: int, num_slots: int, is_spread: bool, repeats: int) -> dict[str, object]:
    query = states(NUM_HEADS, num_queries)
    layers = [tuple(states(NUM_KV_HEADS, num_slots) for _ in range(2)) for _ in range(NUM_LAYERS)]
    last = torch.arange(num_slots - num_queries, num_slots)
    places = torch.randperm(num_slots)[:num_queries].sort().values if is_spread else last
    mask = (torch.arange(num_slots) <= places[:, None])[None, None]
    ways = {"fused": _masked_attention, "products": bfloat16_attention.attend}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):  # the first is to warm up
        for way, attend in ways.items():
            start = time.perf_counter()
            for key, value in layers:
                attend(query, key, value, mask, None)
            seconds[way].append((time.perf_counter() - start) / NUM_LAYERS)
    expected = exact(query, *layers[0], mask)
    errors = {
        way: float((attend(query, *layers[0], mask, None).double() - expected).norm() / expected.norm())
        for way, attend in ways.items()
    }
    pairs = zip(seconds["products"][1:], seconds["fused"][1:], strict=True)
    return {
        "queries": f"{num_queries:,}, {'spread' if is_spread else 'at the end'}",
        "num_slots": num_slots,
        **{f"{way}_seconds": statistics.median(times[1:]) for way, times in seconds.items()},
        "ratio": statistics.median(one / other for one, other in pairs),
        **{f"{way}_error": f"{100 * error:.2f}" for way, error in errors.items()},
        "is_taken": "yes" if bfloat16_attention.takes(query, layers[0][0], mask) else "no",
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure two ways to attend over a long context.")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    result = {
        "command": f"python tests/benchmarks/bench_attention.py --repeats {options.repeats}",
        **asdict(Environment.of(load_model(smollm2_path(), device="cpu"), "shape of SmolLM2-135M")),
        "columns": COLUMNS,
        "rows": [measure(*shape, options.repeats) for shape in SHAPES],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
