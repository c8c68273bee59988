"""Time to first token under the default, beside full prefill, from one short passage to many.

    python tests/benchmarks/bench_auto.py

What: a question over 1 to 80 passages whose blocks are in memory is asked through ``BlockCache.answer`` with
``auto``, with the paper's ``block``, and with ``full``, which computes the whole prompt. An answer is one
token; timed is the whole call. All take turns, seven rounds after one to warm up. ``auto`` prefills in full
what is sooner that way, so it should never be slower than ``full``; the table says what it chose.
SmolLM2-135M-Instruct in bfloat16, which was not block-fine-tuned, so that ``auto`` repairs what it reuses.

How it can mislead: the bound is measured when the cache is opened, on a machine that may be busy just then.
No context of an earlier answer is kept, because the same question is asked again and again.

Others: ``--model FOLDER --passages 1 5 --passage-tokens 30 100 --repeats 3``.
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

from rag_blockcache import Answer, BlockCache, Question
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import in_turn, ratios
from rag_blockcache.evaluation.token_prompts import token_run

COLUMNS = {
    "num_passages": "passages",
    "num_tokens": "prompt tokens",
    "full_seconds": "full prefill",
    "block_seconds": "block",
    "auto_seconds": "auto",
    "auto_policy": "auto stands for",
    "auto_times_sooner": "auto: times sooner",
    "auto_range": "from, to",
}


def measure(cache: BlockCache, texts: list[str], repeats: int) -> dict[str, object]:
    """Measure one prompt."""
    request = Question("What do these passages say?", texts)
    cache.prefill(texts)

    def timed(policy: str) -> tuple[float, Answer]:
        start = time.perf_counter()
        answer = cache.answer(request, policy=policy, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - start, answer

    runs = {policy: lambda policy=policy: timed(policy) for policy in ("full", "block", "auto")}
    _, found = in_turn(runs, repeats)
    seconds = {policy: [each for each, _ in some] for policy, some in found.items()}
    sooner = ratios(seconds["full"], seconds["auto"])
    answer = found["auto"][0][1]
    return {
        "num_passages": len(texts),
        "num_tokens": answer.num_prompt_tokens,
        **{f"{policy}_seconds": median(some) for policy, some in seconds.items()},
        "auto_policy": answer.policy,
        "auto_times_sooner": sooner.median,
        "auto_range": f"{sooner.min:.2f}, {sooner.max:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the default beside full prefill.")
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--passages", type=int, nargs="+", default=[1, 2, 5, 10, 20, 80])
    parser.add_argument("--passage-tokens", type=int, nargs="+", default=[10, 30, 95])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = options.model or smollm2_path()
    rows = []
    with BlockCache(model, None, memory_budget_bytes=None, context_budget_bytes=0) as cache:
        run = token_run(cache.model, max(options.passages) * max(options.passage_tokens), reference_text())
        for length in options.passage_tokens:
            texts = [cache.model.text(run[at : at + length]) for at in range(0, len(run), length)]
            for number in options.passages:
                rows.append(measure(cache, texts[:number], options.repeats))
                print({COLUMNS[key]: value for key, value in rows[-1].items()}, flush=True)
        environment = asdict(Environment.of(cache.model, None))
    rows.sort(key=lambda row: row["num_tokens"])
    command = " ".join(["python tests/benchmarks/bench_auto.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **environment, "columns": COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
