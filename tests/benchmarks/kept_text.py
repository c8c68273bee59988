"""What fine-tuning costs general text: perplexity with adapters and without, under full attention.

    python tests/benchmarks/kept_text.py ADAPTER ... [--texts FILE ...] --out docs/benchmarks/kept-text.json

What: the perplexity of a text under SmolLM2-135M-Instruct in bfloat16, as it was published and with each
adapter. The texts are the start of the Python language reference, which every Python has and no training
here, and the files that are given.

How it can mislead: a few thousand tokens of two kinds of English. What training held to the base's word, or
what is like it, is kept better than other text.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from language_reference import reference_text
from small_models import smollm2_path

from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.perplexity import text_perplexity
from rag_blockcache.loading import load_model

CHARACTERS = 24_000  # of each text
COLUMNS = {
    "model": "model",
    "text": "text",
    "num_tokens": "tokens",
    "perplexity": "perplexity",
    "change": "change",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what adapters cost general text.")
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    texts = {"Python language reference": reference_text()}
    texts |= {path.stem: path.read_text(encoding="utf-8") for path in options.texts}
    rows, bare = [], {}
    for adapter in (None, *options.adapters):
        model = load_model(smollm2_path(), adapter=adapter, device="cpu")
        for name, text in texts.items():
            found = text_perplexity(model, text[:CHARACTERS])
            bare.setdefault(name, found.perplexity)
            rows.append(
                {
                    "model": "as published" if adapter is None else adapter.name,
                    "text": name,
                    "num_tokens": found.num_tokens,
                    "perplexity": f"{found.perplexity:.2f}",
                    "change": ""
                    if adapter is None
                    else f"{100 * (found.perplexity / bare[name] - 1):+.1f} %",
                }
            )
            print(rows[-1], file=sys.stderr)
    given = " ".join(
        [*(path.name for path in options.adapters), "--texts", *(path.name for path in options.texts)]
    )
    result = {
        "command": f"python tests/benchmarks/kept_text.py {given}",
        **asdict(Environment.of(model, "SmolLM2-135M-Instruct")),
        "columns": COLUMNS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
