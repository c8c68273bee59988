"""What an evaluation of answers is asked for: each option in one place, with its default and its help.

The command line, ``python -m rag_blockcache.evaluation`` and callers from Python take them from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rag_blockcache.errors import InvalidInputError


def _option(default: Any, help_: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help_} | ({"metavar": metavar} if metavar else {}))


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how; each field says in its metadata what it means, see the how-to."""

    model: str = field(metadata={"help": "Hub id or folder of the model."})
    data: list[str] = field(
        metadata={
            "metavar": "FILE",
            "help": "Benchmarks: files of questions, answers and passages, hf:nq, hf:triviaqa, hf:hotpotqa, "
            "hf:2wiki, or hf:owner/name:split.",
        }
    )
    policies: str = _option(
        "block,block/stand-ins,auto",
        "Reuse policies. Behind each may stand /stand-ins or /conditioned (what blocks see), /int8 or /int4 "
        "(how blocks are kept) and /unmoved (no position re-encoding). full and no-passages are measured in "
        "any case.",
    )
    limit: int | None = _option(None, "Questions of each benchmark; all if left out.")
    num_passages: str = _option("", "Ask with these numbers of passages.", "N,N,...")
    join_words: str = _option(
        "", "Join neighbouring passages until they have so many words; 0 leaves them as they are.", "N,N,..."
    )
    orders: str = _option(
        "given",
        "Ask with passages in these orders: given, reversed, shuffled, gold-first, gold-last, twice.",
    )
    max_new_tokens: int = _option(64, "Longest answer, in tokens.")
    batch_size: int | None = _option(None, "Questions at a time; by device and length if left out.")
    timed: int = _option(20, "Questions that are asked alone too, to time the first token.")
    score_gold: bool = _option(False, "Measure the perplexity of gold answers under each policy too.")
    text: str | None = _option(None, "Measure the perplexity of this text under full attention too.", "FILE")
    report: str | None = _option(
        None, "Keep predictions and a report here; a run that was stopped goes on from them.", "DIR"
    )
    adapter: str | None = _option(None, "Hub id or folder of a PEFT adapter to load into the model.")
    passage_format: str = _option("paper", "How passages are shown: paper, plain, verbatim or template.")
    preamble: str | None = _option(None, "Text before the passages, instead of that of the format.")
    device: str | None = _option(
        None, "Where the model runs: cpu, cuda, cuda:1. A GPU if there is one, if left out."
    )
    dtype: str | None = _option(
        None, "What it computes in: bfloat16, float16, float32. That of its files if left out."
    )

    def check(self) -> None:
        """Raise what is wrong with numbers.

        Raises:
            InvalidInputError: If one is too small, or no benchmark is named.
        """
        if not self.data:
            raise InvalidInputError("data is empty; name one benchmark at least")
        for name, least in {"limit": 1, "max_new_tokens": 1, "batch_size": 1, "timed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"{name} is {value}; it must be at least {least}")


def listed_numbers(name: str, text: str, *, least: int) -> list[int]:
    """Read whole numbers with commas between them; none of an empty text.

    Raises:
        InvalidInputError: If one is no number, or below ``least``.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InvalidInputError(
            f"{name} is {text!r}; write whole numbers from {least} on, with commas between them"
        )
    return [int(word) for word in words]
