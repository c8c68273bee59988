"""What codecs lose: divergence of the next token from that over exact blocks, on real questions.

    python tests/benchmarks/codec_quality.py QUESTIONS.jsonl.gz ... --out docs/benchmarks/codec-quality.json

What: the first questions of each file (records of ``rag-blockcache eval``) are answered over some of their
passages by SmolLM2-135M-Instruct in bfloat16, under the policy ``block``, with up to 16 tokens, greedily.
At each of these tokens the distribution of the next one, given the same tokens before, is computed over
blocks of every codec and compared with that over exact ones: Kullback-Leibler divergence in nats, and how
often the likeliest token is the same. ``rounding`` is the same model in float32, over exact blocks: what
computing in bfloat16 changes by itself.

How it can mislead: SmolLM2 is small. Divergence says that something changed, not that an answer became
worse: ``rag-blockcache eval --arms block,block/int8,block/int4`` counts right answers.

``--groups 32 64 128`` also tries other numbers of tokens and channels that share a scale.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from small_models import smollm2_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from rag_blockcache import BlockCache, Question, quantization
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.qa_files import read_examples

COLUMNS = {
    "codec": "codec",
    "group": "in groups of",
    "percent_of_exact": "bytes, % of exact",
    "mean_millinats": "mean divergence, 1/1000 nat",
    "p99_millinats": "99th percentile",
    "percent_same": "% same likeliest token",
}
ANSWER_TOKENS = 16


@torch.inference_mode()
def next_tokens(cache: BlockCache, question: Question, answer: list[int]) -> torch.Tensor:
    """Return log-probabilities before each token of an answer, ``(num_tokens, vocab_size)``."""
    plan = cache._planner.plan(
        question, policy="block", max_new_tokens=0, start=0.0, continuation=tuple(answer[:-1])
    )
    return cache._prefill([plan], num_logits=len(answer))[1][0].float().log_softmax(dim=-1)


def compared(codec: str, group: int | None, cache: BlockCache, asked, exact_bytes: int) -> dict[str, object]:
    """Compare a cache with the exact one, over all questions."""
    divergences, same = [], []
    for question, answer, exact in asked:
        found = next_tokens(cache, question, answer)
        divergences += (exact.exp() * (exact - found)).sum(dim=-1).tolist()
        same += (exact.argmax(dim=-1) == found.argmax(dim=-1)).tolist()
    return {
        "codec": codec,
        "group": group,
        "percent_of_exact": 100 * bytes_of(cache) / exact_bytes if codec in quantization.CODECS else None,
        "mean_millinats": 1000 * statistics.mean(divergences),
        "p99_millinats": 1000 * statistics.quantiles(divergences, n=100)[98],
        "percent_same": 100 * statistics.mean(same),
    }


def bytes_of(cache: BlockCache) -> int:
    return sum(states.num_bytes for states in cache.store.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what codecs change in the next token.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--examples", type=int, default=12, help="questions of each file")
    parser.add_argument("--passages", type=int, default=3, help="passages of each question")
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--out", type=Path, help="where the result goes beside stdout")
    options = parser.parse_args()
    examples = [each for path in options.files for each in read_examples(path, options.examples)]
    questions = [Question(each.question, tuple(each.passages[: options.passages])) for each in examples]
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def opened(**chosen) -> BlockCache:
        return BlockCache(
            network, None, tokenizer=tokenizer, memory_budget_bytes=None, blocks_see="themselves", **chosen
        )

    asked = []
    with opened() as exact:
        for question in questions:
            answer = exact.answer(question, policy="block", max_new_tokens=ANSWER_TOKENS, do_sample=False)
            asked.append((question, answer.token_ids, next_tokens(exact, question, answer.token_ids)))
        exact_bytes, environment = bytes_of(exact), Environment.of(exact.model, str(path))
    rows = []
    for codec in ("int8", "int4"):
        for group in options.groups:
            quantization._GROUP = group
            with opened(codec=codec) as cache:
                rows.append(compared(codec, group, cache, asked, exact_bytes))
            print(rows[-1], flush=True)
    network.float()
    with opened() as cache:
        rows.append(compared("rounding", None, cache, asked, exact_bytes))
    command = ["python", "tests/benchmarks/codec_quality.py", *(path.name for path in options.files)]
    for name in ("examples", "passages", "groups"):
        if getattr(options, name) != parser.get_default(name):
            given = getattr(options, name)
            command += [f"--{name}", *map(str, given if isinstance(given, list) else [given])]
    result = {
        "command": " ".join(command),
        **asdict(environment),
        "num_questions": len(asked),
        "num_tokens": sum(len(answer) for _, answer, _ in asked),
        "columns": COLUMNS,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
