"""Tokens per second after the first, beside the bare model's own ``generate()``, one prompt and several.

    python tests/benchmarks/bench_decode.py

What: as many tokens are decoded greedily behind the same prompts by ``BlockCache``, over reused blocks, and
by ``generate()`` of transformers, over its own cache, in turn. Several prompts are decoded in step by both;
they are of different lengths (each a passage shorter than the one before, down to half), which transformers
pads on the left. Timed is from the first token to the last, as a criterion of ``generate()`` sees them, so
that prefilling is in no number. SmolLM2-135M-Instruct in bfloat16.

How it can mislead: both call the same ``generate()``; what differs is the context and the attention over it.
Neither stops at the end of an answer.

Others: ``--model FOLDER --lengths 512 2048 --batches 1 4 --tokens 32 --repeats 3``.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from language_reference import reference_text
from small_models import smollm2_path
from transformers.generation.stopping_criteria import StoppingCriteria

from rag_blockcache import BlockCache, Question
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.stopwatch import in_turn, ratios
from rag_blockcache.evaluation.token_prompts import token_run

COLUMNS = {
    "num_tokens": "prompt tokens",
    "num_prompts": "prompts in step",
    "bare_tokens_per_second": "bare model, tokens/s",
    "tokens_per_second": "over blocks, tokens/s",
    "times_bare": "times the bare model",
    "times_bare_range": "from, to",
}
PASSAGE_TOKENS = 100
GREEDY = {"do_sample": False}


class Ticks(StoppingCriteria):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        return self.times[-1] - self.times[0]


def requests(cache: BlockCache, run: list[int], length: int, number: int) -> list[Question]:
    """Return questions over passages, the longest prompt first, about as long as asked for."""
    texts = [
        cache.model.text(run[start : start + PASSAGE_TOKENS]) for start in range(0, length, PASSAGE_TOKENS)
    ]
    fewest = max(1, len(texts) // 2)
    return [Question("What is a statement?", texts[: max(fewest, len(texts) - i)]) for i in range(number)]


def over_blocks(cache: BlockCache, asked: list[Question], tokens: int) -> float:
    """Decode with the library."""
    ticks = Ticks()
    cache.answer_batch(
        asked,
        policy="block",
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        stopping_criteria=[ticks],
        **GREEDY,
    )
    assert len(ticks.times) == tokens
    return ticks.seconds


def bare(cache: BlockCache, asked: list[Question], tokens: int) -> float:
    """Decode with transformers alone."""
    prompts = [[token for segment in cache.segments(each) for token in segment] for each in asked]
    width, ticks = max(map(len, prompts)), Ticks()
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache.model.network.generate(
        input_ids.to(cache.model.device),
        attention_mask=mask.to(cache.model.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        stopping_criteria=[ticks],
        **GREEDY,
    )
    return ticks.seconds


def measure(cache: BlockCache, run: list[int], length: int, number: int, tokens: int, repeats: int) -> dict:
    """Measure prompts of one length, so many at a time."""
    asked = requests(cache, run, length, number)
    cache.prefill(asked[0].passages)
    runs = {
        "bare": lambda: bare(cache, asked, tokens),
        "blocks": lambda: over_blocks(cache, asked, tokens),
    }
    _, found = in_turn(runs, repeats)
    decoded = number * (tokens - 1)
    sooner = ratios(found["bare"], found["blocks"])
    return {
        "num_tokens": sum(map(len, cache.segments(asked[0]))),
        "num_prompts": number,
        "bare_tokens_per_second": decoded / median(found["bare"]),
        "tokens_per_second": decoded / median(found["blocks"]),
        "times_bare": sooner.median,
        "times_bare_range": f"{sooner.min:.2f}, {sooner.max:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure decoding beside the bare model.")
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct if left out")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 7800])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with BlockCache(
        options.model or smollm2_path(), None, memory_budget_bytes=None, context_budget_bytes=0
    ) as cache:
        run = token_run(cache.model, max(options.lengths) + PASSAGE_TOKENS, reference_text())
        rows = []
        for length in options.lengths:
            for number in options.batches:
                if number > 1 and length > 4096:
                    continue
                rows.append(measure(cache, run, length, number, options.tokens, options.repeats))
                print({COLUMNS[key]: value for key, value in rows[-1].items()}, flush=True)
        environment = asdict(Environment.of(cache.model, None))
    command = " ".join(["python tests/benchmarks/bench_decode.py", *sys.argv[1:]])
    print(json.dumps({"command": command, **environment, "columns": COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
