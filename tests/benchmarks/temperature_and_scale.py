"""What a temperature and a scale for placed passages change in answers, as APE has them.

    python tests/benchmarks/temperature_and_scale.py QUESTIONS.jsonl.gz ... --limit 15 --out FILE

What: the question's tokens, and those of the answer, attend to passages with their products divided by a
temperature, and their sum of exponentials raised to the power of a scale, before passages and all else share
one softmax. Blocks of each kind (alone, behind the preamble, behind stand-ins) are placed and not repaired.
Fidelity is that of ``rag-blockcache eval``: along full attention's own answers of up to 32 tokens, 0 for no
passages. A temperature and a scale of 1 are computed by the same formula, so a table that shows another
fidelity than the library's own attention for them would show a mistake.

How it can mislead: few questions; one pair for all layers and heads.

Source: APE, https://arxiv.org/abs/2502.05431
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from language_reference import smollm2_path
from transformers import AttentionInterface

from rag_blockcache import BlockCache, attention
from rag_blockcache.evaluation.agreement import compare
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.prefilled import decode_together, prefill_prompts
from rag_blockcache.evaluation.qa_files import read_examples
from rag_blockcache.request import Question

SIGHTS = {"alone": "themselves", "conditioned": "preamble", "stand-ins": "stand-ins"}
PAIRS = ((1.0, 1.0), (0.9, 1.0), (1.1, 1.0), (1.0, 0.9), (1.0, 0.95), (0.9, 0.9))  # temperature, scale
ROOM = 32  # tokens of an answer
COLUMNS = {
    "blocks": "blocks",
    "temperature": "temperature",
    "scale": "scale",
    "fidelity": "fidelity",
    "agreement": "same token",
}


@contextmanager
def changed_attention(passages: range, temperature: float, scale: float) -> Iterator[None]:
    """Attend otherwise to the slots of passages, inside this block; for one prompt, computed at its end."""

    def attend(module, query, key, value, mask, **options):
        groups = query.shape[1] // key.shape[1]
        keys, values = (each.repeat_interleave(groups, dim=1).float() for each in (key, value))
        scores = query.float() @ keys.transpose(2, 3) * (options.get("scaling") or query.shape[-1] ** -0.5)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        scores = scores.masked_fill(future, float("-inf"))
        placed = scores[..., passages.start : passages.stop] / temperature
        placed = placed + (scale - 1) * placed.logsumexp(dim=-1, keepdim=True)
        scores = torch.cat((scores[..., : passages.start], placed, scores[..., passages.stop :]), dim=-1)
        return (scores.softmax(dim=-1) @ values).to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(attention.NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(attention.NAME, attention.grouped_attention)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure temperature and scale for placed passages.")
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=15, help="questions of each file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    plain = BlockCache(smollm2_path(), None, device="cpu", context_budget_bytes=0)
    model = plain.model
    caches = {
        name: BlockCache(
            model.network, None, tokenizer=plain.tokenizer, blocks_see=sight, context_budget_bytes=0
        )
        for name, sight in SIGHTS.items()
    }
    examples = list(chain.from_iterable(read_examples(path, options.limit) for path in options.questions))
    lost, same, num_tokens = defaultdict(float), defaultdict(int), 0
    for number, example in enumerate(examples, 1):
        question = Question(example.question, example.passages)
        [full] = prefill_prompts(plain, [question], "full", room=ROOM)
        [answer] = decode_together([full], ROOM)
        [reference] = full.along([answer])
        [bare] = prefill_prompts(plain, [Question(example.question, ())], "full", room=ROOM)
        num_tokens += len(answer)
        lost[None] += compare(reference, bare.along([answer])[0], answer).divergence
        spans = [
            span for index, span in full.plans[0].spans() if full.plans[0].segments[index].kind == "passage"
        ]
        passages = range(spans[0].start, spans[-1].stop)
        for name, cache in caches.items():
            cache.prefill(example.passages)
            for pair in PAIRS:
                with changed_attention(passages, *pair):
                    [placed] = prefill_prompts(cache, [question], "block", room=ROOM)
                    found = compare(reference, placed.along([answer])[0], answer)
                lost[name, pair] += found.divergence
                same[name, pair] += found.num_same
            cache.forget(example.passages)
        print(f"{number} of {len(examples)}", flush=True)
    rows = [
        {
            "blocks": name,
            "temperature": pair[0],
            "scale": pair[1],
            "fidelity": f"{1 - lost[name, pair] / lost[None]:.3f}",
            "agreement": f"{same[name, pair] / num_tokens:.3f}",
        }
        for name in SIGHTS
        for pair in PAIRS
    ]
    given = " ".join(path.name for path in options.questions)
    result = {
        "command": f"python tests/benchmarks/temperature_and_scale.py {given} --limit {options.limit}",
        **asdict(Environment.of(model, "SmolLM2-135M-Instruct")),
        "num_questions": len(examples),
        "columns": COLUMNS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
