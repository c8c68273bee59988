"""Requests per second answered together, beside one at a time.

    python tests/benchmarks/bench_batch.py

What: 16 questions over passages whose blocks are in memory, with a final block of about 50 tokens and 32 new
tokens each, are answered by 16 calls of ``answer`` and by one of ``answer_batch``, in turn. Timed is the
whole, from the call to the last token. Passages have about 100 tokens; every request shares some of them with
the one before it. Greedy; nothing stops at the end of an answer. SmolLM2-135M-Instruct in bfloat16.

How it can mislead: nobody waits for a batch to fill here. In half precision a sum over another number of
rows rounds in another way, so that of two tokens that are equally likely the other may be chosen; the column
of answers that are the same counts whole answers. In float32 they are the same (``tests/``).

Others: ``--model FOLDER --passages 5 20 --requests 8 --tokens 64 --repeats 3``.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from language_reference import reference_text
from small_models import smollm2_path

from rag_blockcache import BlockCache, Question
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import in_turn, ratios
from rag_blockcache.evaluation.token_prompts import token_run

COLUMNS = {
    "num_tokens": "prompt tokens",
    "num_requests": "requests",
    "policy": "policy",
    "alone_seconds": "one at a time",
    "together_seconds": "together",
    "times_throughput": "times the throughput",
    "times_throughput_range": "from, to",
    "percent_same_answers": "% same answers",
}
PASSAGE_TOKENS = 100
QUESTION = (
    "What do these passages say about number {}? Please answer in one plain sentence, and name the passage "
    "that the answer comes from, so that a reader can find it."
)


def requests(cache: BlockCache, num_passages: int, number: int) -> list[Question]:
    """Return questions over passages of which half are those of the one before."""
    step = max(1, num_passages // 2)
    run = token_run(cache.model, PASSAGE_TOKENS * (num_passages + step * number), reference_text())
    starts = range(0, len(run) - PASSAGE_TOKENS + 1, PASSAGE_TOKENS)
    texts = [cache.model.text(run[start : start + PASSAGE_TOKENS]) for start in starts]
    return [
        Question(QUESTION.format(place), texts[place * step : place * step + num_passages])
        for place in range(number)
    ]


def measure(cache: BlockCache, num_passages: int, policy: str, options: argparse.Namespace) -> dict:
    """Measure requests over so many passages each."""
    asked = requests(cache, num_passages, options.requests)
    cache.prefill([passage for each in asked for passage in each.passages])
    wanted = {
        "policy": policy,
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens,
        "do_sample": False,
    }

    def timed(answer):
        start = time.perf_counter()
        answers = answer()
        return time.perf_counter() - start, [each.token_ids for each in answers]

    runs = {
        "alone": lambda: timed(lambda: [cache.answer(each, **wanted) for each in asked]),
        "together": lambda: timed(lambda: cache.answer_batch(asked, **wanted)),
    }
    first, found = in_turn(runs, options.repeats)
    seconds = {name: [each for each, _ in some] for name, some in found.items()}
    sooner = ratios(seconds["alone"], seconds["together"])
    same = [one == other for one, other in zip(first["alone"][1], first["together"][1], strict=True)]
    return {
        "num_tokens": round(sum(sum(map(len, cache.segments(each))) for each in asked) / len(asked)),
        "num_requests": len(asked),
        "policy": policy,
        "alone_seconds": median(seconds["alone"]),
        "together_seconds": median(seconds["together"]),
        "times_throughput": sooner.median,
        "times_throughput_range": f"{sooner.min:.2f}, {sooner.max:.2f}",
        "percent_same_answers": 100 * sum(same) / len(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure answers together beside one at a time.")
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--passages", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--policies", nargs="+", default=["block"])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = options.model or smollm2_path()
    with BlockCache(
        model, None, dtype=options.dtype, memory_budget_bytes=None, context_budget_bytes=0
    ) as cache:
        rows = []
        for num_passages in options.passages:
            for policy in options.policies:
                rows.append(measure(cache, num_passages, policy, options))
                print({COLUMNS[key]: value for key, value in rows[-1].items()}, flush=True)
        environment = asdict(Environment.of(cache.model, None))
    command = " ".join(["python tests/benchmarks/bench_batch.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **environment, "columns": COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
