"""What a request costs beside the model: finding passages, planning, looking up, keeping record.

    python tests/benchmarks/bench_overhead.py

What: ``BlockCache.answer`` over 20 passages of about 100 tokens whose blocks are in memory, in a directory
that knows 1,000 or 1,000,000 passages, under the paper's ``block``. Once the passages come apart from the
question, as from a retriever; once inside a prompt that other code has written, where they must be found. An
answer is one token. Overhead is the time of the whole call without placing blocks and without the pass of
the model, as the answer reports both. Median and slowest of 30 calls after three.
SmolLM2-135M-Instruct in bfloat16.

How it can mislead: passages that nobody asks for are short (200 bytes), so that a million of them are made in
a few minutes. Sampling the one token counts as overhead too. No context of an earlier answer is kept, because
the same question is asked again and again.

Others: ``--model FOLDER --sizes 1000 5000 --repeats 5``.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench_matching import passages_of
from language_reference import reference_text
from small_models import smollm2_path

from rag_blockcache import BlockCache, Question, Text
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.token_prompts import token_run
from rag_blockcache.passage_registry import PassageRegistry

COLUMNS = {
    "num_known": "known passages",
    "num_tokens": "prompt tokens",
    "question_seconds": "overhead, passages given",
    "question_slowest_seconds": "slowest of them",
    "text_seconds": "overhead, passages found in a prompt",
    "text_slowest_seconds": "slowest of those",
    "model_seconds": "placing and pass of the model",
}
_ASKED = "What do these passages say?"


def overheads(
    cache: BlockCache, request: Question | Text, repeats: int
) -> tuple[list[float], list[float], int]:
    """Return for each call the seconds beside the model, those of the model, and the length of the prompt."""
    beside, inside = [], []
    for number in range(3 + repeats):
        start = time.perf_counter()
        answer = cache.answer(request, policy="block", max_new_tokens=1, do_sample=False)
        seconds = time.perf_counter() - start
        assert (answer.num_hits, answer.num_misses) == (20, 0), "a passage was not found"
        if number >= 3:
            inside.append(answer.assemble_seconds + answer.final_block_seconds)
            beside.append(seconds - inside[-1])
    return beside, inside, answer.num_prompt_tokens


def measure(model: Path, num_known: int, repeats: int) -> dict[str, float]:
    """Measure one size."""
    with tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-") as directory:
        with PassageRegistry(directory) as registry:
            registry.add(passages_of(num_known - 20, 200, seed=1))
        with BlockCache(model, directory, passage_format="verbatim", context_budget_bytes=0) as cache:
            run = token_run(cache.model, 20 * 100, reference_text())
            texts = [cache.model.text(run[at : at + 100]).strip() for at in range(0, len(run), 100)]
            cache.prefill(texts)
            given, model_seconds, num_tokens = overheads(cache, Question(_ASKED, texts), repeats)
            found, _, _ = overheads(cache, Text("\n\n".join(["Read.", *texts, _ASKED])), repeats)
    return {
        "num_known": num_known,
        "num_tokens": num_tokens,
        "question_seconds": statistics.median(given),
        "question_slowest_seconds": max(given),
        "text_seconds": statistics.median(found),
        "text_slowest_seconds": max(found),
        "model_seconds": statistics.median(model_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a request costs beside the model.")
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    model = options.model or smollm2_path()
    rows = []
    for num_known in options.sizes:
        rows.append(measure(model, num_known, options.repeats))
        print({COLUMNS[key]: value for key, value in rows[-1].items()}, flush=True)
    with BlockCache(model, None) as cache:
        environment = asdict(Environment.of(cache.model, None))
    command = " ".join(["python tests/benchmarks/bench_overhead.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **environment, "columns": COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
