"""Time to the first token beside what one would use instead, on the same prompts.

    python tests/benchmarks/bench_alternatives.py

What: a question over the same passages is asked again and again, the passages in another order each time, as
a retriever brings them. All ways take turns by request, five rounds after one to warm up; medians, and ratios
to the full prefill of transformers within a round. The ways, each in ``alternatives/``:

- transformers, all computed, and with the cache of the prompt before kept up to the first token that differs;
- llama.cpp in bfloat16, likewise, if an environment for it is there (see ``--llama-cpp``);
- Block-Attention as its authors serve it, blocks encoded in the request as in their code, or kept in memory;
- TurboRAG: a file for each chunk, all keys turned anew in every layer at every step;
- this library: blocks in memory (also as int8 and int4) or on disk under the paper's policy, ``block``, and
  from memory under ``link-16+query-0.08``, what ``auto`` reuses with on a model that was not fine-tuned.

Passages of about 100 tokens of the Python language reference, a final block of about 50, prompts of exactly
the length given; SmolLM2-135M-Instruct in bfloat16. Before a length is timed, each way gives logits of two
requests, which are compared with one pass of the bare model under the mask that the way stands for.

How it can mislead: full attention and block attention compute different things. Ways of the second kind,
``block`` of this library among them, lose answers on a model that was not fine-tuned for them, as this one
(docs/what-reuse-costs.md); ``link-16+query-0.08`` is what repairs them. The others start from token ids; this
library starts from text, which it renders and tokenizes. Files are in the page cache. Block-Attention and
TurboRAG are implementations of what their authors published, in today's transformers, with its SDPA where
theirs call other kernels; not their programs. Every request here has the same passages, so a prefix is found
more often than between requests that share few.

Others: ``--model FOLDER --lengths 512 --passage-tokens 200 --repeats 3 --ways full prefix block``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from alternatives.block_attention import BlockAttention
from alternatives.llama_cpp import LlamaCpp, how_to_install, smollm2_gguf
from alternatives.prompts import Request, fitting_passages, shuffled
from alternatives.references import distance, reference_logits
from alternatives.stock import FullPrefill, PrefixCache
from alternatives.this_library import ThisLibrary
from alternatives.turborag import TurboRAG
from alternatives.way import FirstToken, Way
from language_reference import reference_text
from small_models import cache_folder, smollm2_path
from torch import Tensor

from rag_blockcache import BlockCache
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import in_turn, ratios
from rag_blockcache.reuse import BLOCK, REPAIR

WAYS = {
    "full": "transformers, full prefill",
    "prefix": "transformers, prefix cache",
    "llama_cpp": "llama.cpp, full prefill",
    "llama_cpp_prefix": "llama.cpp, prefix cache",
    "block_attention_encoding": "Block-Attention, blocks encoded in the request",
    "block_attention": "Block-Attention, blocks in memory",
    "turborag": "TurboRAG, blocks in files",
    "block": "rag_blockcache, block",
    "disk": "rag_blockcache, block, from disk",
    "int8": "rag_blockcache, block, int8",
    "int4": "rag_blockcache, block, int4",
    "repair": f"rag_blockcache, {REPAIR.name}",
}
COLUMNS = {
    "num_tokens": "prompt tokens",
    **{f"{name}_seconds": label for name, label in WAYS.items()},
    **{f"{name}_times_sooner": f"{label}: times sooner" for name, label in WAYS.items() if name != "full"},
    "prefix_percent_reused": "% of the prompt in its prefix cache",
}
LLAMA_CPP = cache_folder() / "llama-cpp"  # an environment of its own, see ``how_to_install``
DRAWN = ("full", "prefix", "llama_cpp", "block_attention_encoding", "block_attention", "turborag")
DRAWN += ("block", "repair")
NUM_CHECKED = 2  # requests whose logits are compared: one that finds nothing to go on from, one that may
# Most distance between logits that rounding explains, relative.
ROUNDING = {torch.float32: 1e-4}
HALF_ROUNDING = 0.03


def makers(
    cache: BlockCache, folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], Way | None]]:
    """Return how to make each way, by name; None comes of what is not installed."""
    network = cache.model.network

    def ours(codec: str = "none", *, directory: Path | None = None, **how: Any) -> Way:
        budget = None if directory is None else 0  # nothing from disk stays in memory
        tokenizer = cache.tokenizer
        bounds = {"memory_budget_bytes": budget, "context_budget_bytes": 0, "blocks_see": "themselves"}
        blocks = BlockCache(network, directory, tokenizer=tokenizer, codec=codec, **bounds)
        return ThisLibrary(blocks, **{"policy": BLOCK.name, **how})

    def llama_cpp(*, keeps_prefix: bool) -> Way | None:
        if options.gguf is None or not options.llama_cpp.is_file():
            return None
        model = options.llama_cpp, options.gguf, folder
        return LlamaCpp(*model, context_length=max(options.lengths) + 256, keeps_prefix=keeps_prefix)

    return {
        "full": lambda: FullPrefill(network),
        "prefix": lambda: PrefixCache(network),
        "llama_cpp": lambda: llama_cpp(keeps_prefix=False),
        "llama_cpp_prefix": lambda: llama_cpp(keeps_prefix=True),
        "block_attention_encoding": lambda: BlockAttention(network, keeps_blocks=False),
        "block_attention": lambda: BlockAttention(network, keeps_blocks=True),
        "turborag": lambda: TurboRAG(network, folder),
        "block": ours,
        "disk": lambda: ours(directory=folder / "cache"),
        "int8": lambda: ours("int8", loss=0.02),
        "int4": lambda: ours("int4", loss=0.2),
        "repair": lambda: ours(policy=REPAIR.name, stands_for=""),
    }


def check(name: str, way: Way, requests: list[Request], references: list[dict[str, Tensor]]) -> float:
    """Fail where a way does not give the logits that it should; return how far off they were at most.

    What lies between block and full attention must be nearer to full attention than block attention is.
    """
    worst = 0.0
    for request, reference in zip(requests, references, strict=True):
        found = way.with_logits(request)
        full, gap = reference["full"], distance(reference["block"], reference["full"])
        rounding = ROUNDING.get(full.dtype, HALF_ROUNDING)
        attention = way.stands_for or "full"
        off = distance(found.logits, reference[attention])
        limit = min(rounding, gap / 2) + way.loss if way.stands_for else gap
        assert off <= limit, f"{name} is {off:.4f} from {attention} attention, above {limit:.4f}"
        slack = rounding * found.logits.abs().max()
        assert found.logits[found.token] >= found.logits.max() - slack, f"{name} chose an unlikely token"
        worst = max(worst, off)
    return worst


def timed(way: Way, requests: Iterator[Request]) -> tuple[float, FirstToken]:
    """Take the next request to its first token."""
    request = next(requests)
    start = time.perf_counter()
    found = way.first_token(request)
    return time.perf_counter() - start, replace(found, logits=None)


def measure(cache: BlockCache, length: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Check all ways, then let them take turns, at one length."""
    passages = fitting_passages(cache, reference_text(), length, options.passage_tokens)
    asked = list(islice(shuffled(cache, passages), NUM_CHECKED + 1 + options.repeats))
    with ExitStack() as stack:
        ways: dict[str, Way] = {}
        make = makers(cache, folder, options)
        for name in options.ways:
            way = make[name]()
            if way is not None:
                ways[name] = stack.enter_context(closing(way))
                way.prepare(asked[0])
        checked = asked[:NUM_CHECKED]
        references = [
            {kind: reference_logits(cache.model.network, request, kind) for kind in ("full", "block")}
            for request in checked
        ]
        off = {name: check(name, way, checked, references) for name, way in ways.items()}
        runs = {name: partial(timed, way, iter(asked[NUM_CHECKED:])) for name, way in ways.items()}
        _, found = in_turn(runs, options.repeats, lambda n: print(f"{length} tokens, round {n}", flush=True))
    return row_of(asked[0], found, off)


def row_of(
    request: Request, found: dict[str, list[tuple[float, FirstToken]]], off: dict[str, float]
) -> dict[str, Any]:
    """Summarise the rounds at one length; what was not measured is None."""
    num_tokens = len(request.token_ids)
    row: dict[str, Any] = {
        "num_tokens": num_tokens,
        "num_passages": len(request.passages),
        "num_final_tokens": len(request.segments[-1]),
    }
    seconds = {name: [each for each, _ in rounds] for name, rounds in found.items()}
    for name in WAYS:
        measured, full = seconds.get(name), seconds.get("full")
        sooner = ratios(full, measured) if measured and full else None
        row[f"{name}_seconds"] = median(measured) if measured else None
        row[f"{name}_times_sooner"] = (
            f"{sooner.median:.2f} ({sooner.min:.2f} to {sooner.max:.2f})" if sooner else None
        )
        shares = [100 * each.num_reused / num_tokens for _, each in found.get(name, [])]
        row[f"{name}_percent_reused"] = sum(shares) / len(shares) if shares else None
    row["rounds_seconds"] = seconds
    row["logit_distances"] = off
    return row


def parsed() -> argparse.Namespace:
    """Read what was typed."""
    parser = argparse.ArgumentParser(description="Measure the first token beside what one would use instead.")
    parser.add_argument("--model", type=Path, help="folder of a Llama; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; SmolLM2's if left out")
    parser.add_argument("--dtype", help="to compute in; that of the files if left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8000])
    parser.add_argument("--passage-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--llama-cpp", type=Path, help="Python that has llama-cpp-python")
    options = parser.parse_args()
    if options.model is None:
        options.model, options.gguf = smollm2_path(), options.gguf or smollm2_gguf()
    options.llama_cpp = options.llama_cpp or LLAMA_CPP / "bin" / "python"
    return options


def main() -> None:
    options = parsed()
    wanted = {"llama_cpp", "llama_cpp_prefix"} & set(options.ways)
    if wanted and options.gguf is not None and not options.llama_cpp.is_file():
        print(f"llama.cpp is left out, there is no {options.llama_cpp}; {how_to_install(LLAMA_CPP)}")
    with BlockCache(
        options.model, None, dtype=options.dtype, memory_budget_bytes=None, context_budget_bytes=0
    ) as cache:
        rows = []
        for length in options.lengths:
            with tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-") as folder:
                rows.append(measure(cache, length, Path(folder), options))
            print({COLUMNS[key]: value for key, value in rows[-1].items() if key in COLUMNS}, flush=True)
        environment = asdict(Environment.of(cache.model, None))
    print(json.dumps(result_of(rows, environment)))


def result_of(rows: list[dict[str, Any]], environment: dict[str, Any]) -> dict[str, Any]:
    """Put together what the documentation shows, and the measurements behind it."""
    drawn = {f"{name}_seconds": WAYS[name] for name in DRAWN if rows[0][f"{name}_seconds"] is not None}
    return {
        "command": " ".join(["python tests/benchmarks/bench_alternatives.py", *sys.argv[1:]]),
        **environment,
        "columns": COLUMNS,
        "rows": rows,
        "plot": {"x": "num_tokens", "y": drawn, "y_label": "time to first token, seconds"},
    }


if __name__ == "__main__":
    main()
