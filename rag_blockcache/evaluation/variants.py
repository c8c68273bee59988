"""The same questions with other passages around them: fewer, more, in another order, or twice.

Everything here is drawn by a seed that depends on the question alone, so that every run and every arm sees
the same prompts.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Sequence

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_metrics import contains_answer, contains_words
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.passages import Passage

_Marked = list[tuple[Passage, bool | None]]


def _gold_first(marked: _Marked, _: random.Random) -> _Marked:
    return sorted(marked, key=lambda pair: not pair[1])


def _gold_last(marked: _Marked, _: random.Random) -> _Marked:
    return sorted(marked, key=lambda pair: bool(pair[1]))


def _shuffled(marked: _Marked, generator: random.Random) -> _Marked:
    return generator.sample(marked, len(marked))


_ORDERS: dict[str, Callable[[_Marked, random.Random], _Marked]] = {
    "given": lambda marked, _: marked,
    "reversed": lambda marked, _: marked[::-1],
    "shuffled": _shuffled,
    "gold-first": _gold_first,
    "gold-last": _gold_last,
    "twice": lambda marked, _: marked * 2,
}
ORDERS = tuple(_ORDERS)

_NUMBER = re.compile(r"\d+ passages?")

POOL = 100  # questions that lend one another passages, counted from the first


def vary(
    examples: Sequence[QaExample],
    *,
    limit: int | None = None,
    join_words: Sequence[int] = (),
    num_passages: Sequence[int] = (),
    orders: Sequence[str] = ("given",),
) -> list[QaExample]:
    """Return every question once for each length of passages, each number of them, and each order.

    Args:
        examples: Of one benchmark; where a question needs more passages, it takes those of its pool: of
            ``POOL`` questions that stand together in the benchmark.
        limit: Vary so many from the start, the others only lend passages; None varies all.
        join_words: See ``joined``; 0 leaves passages as they are, and so does an empty sequence.
        num_passages: How many passages; empty leaves them as they are.
        orders: Names in ``ORDERS``.

    Raises:
        InvalidInputError: If an order is unknown, or there are not enough passages.
    """
    unknown = [order for order in orders if order not in _ORDERS]
    if unknown:
        raise InvalidInputError(f"orders {unknown} are unknown; use {', '.join(ORDERS)}")
    lengths = [[joined(example, words) for example in examples] for words in join_words or (0,)]
    varied = []
    for index in range(len(examples[:limit])):
        start = index // POOL * POOL
        for same_length in lengths:
            example, pool = same_length[index], same_length[start : start + POOL]
            sized = [with_num_passages(example, number, pool) for number in num_passages] or [example]
            varied += [in_order(each, order) for each in sized for order in orders]
    return varied


def joined(example: QaExample, num_words: int) -> QaExample:
    """Return an example whose passages are neighbours joined, until they have so many words each.

    The last one may have fewer. The title of the first is that of the whole, those of the others stand before
    their texts. What is joined is gold if a part of it is.
    """
    if not num_words:
        return example
    groups: list[_Marked] = []
    num_left = 0
    for passage, gold in zip(example.passages, example.is_gold, strict=True):
        if num_left <= 0:
            groups.append([])
            num_left = num_words
        groups[-1].append((passage, gold))
        num_left -= len(passage.text.split())
    return _with(example, [_as_one(group) for group in groups], f"joined to {num_words} words")


def _as_one(group: _Marked) -> tuple[Passage, bool | None]:
    (first, _), *others = group
    texts = [first.text, *(f"{each.title}\n{each.text}".strip() for each, _ in others)]
    marks = [gold for _, gold in group]
    return Passage("\n\n".join(texts), first.title), None if None in marks else any(marks)


def in_order(example: QaExample, order: str) -> QaExample:
    """Return an example with its passages in another order; see ``ORDERS``."""
    marked = list(zip(example.passages, example.is_gold, strict=True))
    ordered = _ORDERS[order](marked, random.Random(example.example_id))
    return _with(example, ordered, "" if order == "given" else order)


def with_num_passages(example: QaExample, number: int, pool: Iterable[QaExample]) -> QaExample:
    """Return an example with so many passages.

    Passages that hold the answer are the last to go; what stays keeps its order. More passages come from
    other questions, hold no gold answer, and are put anywhere.

    Args:
        example: The example.
        number: How many passages.
        pool: Questions whose passages may be added.
    """
    marked = list(zip(example.passages, example.is_gold, strict=True))
    generator = random.Random(example.example_id)
    if number <= len(marked):
        ranks = [(not _helps(example, *pair), generator.random()) for pair in marked]
        kept = sorted(sorted(range(len(marked)), key=ranks.__getitem__)[:number])
        chosen = [marked[index] for index in kept]
    else:
        chosen = _shuffled(marked + _others(example, number - len(marked), pool, generator), generator)
    return _with(example, chosen, f"{number} passage{'s' if number > 1 else ''}")


def without_order(variant: str) -> str:
    """Return the name of a variant without its order, if that leaves the number of passages alone."""
    return ", ".join(part for part in variant.split(", ") if part not in ORDERS or part == "twice")


def without_number(variant: str) -> str:
    """Return the name of a variant without its order and its number of passages."""
    return ", ".join(part for part in without_order(variant).split(", ") if not _NUMBER.fullmatch(part))


def _helps(example: QaExample, passage: Passage, gold: bool | None) -> bool:
    """Tell whether a passage holds the answer; where nobody marked it, by its words."""
    return gold if gold is not None else contains_answer(f"{passage.title} {passage.text}", example.answers)


def _others(example: QaExample, number: int, pool: Iterable[QaExample], generator: random.Random) -> _Marked:
    own = set(example.passages)
    found = dict.fromkeys(passage for other in pool for passage in other.passages if passage not in own)
    candidates = generator.sample(list(found), len(found))
    kept: _Marked = []
    for passage in candidates:
        if len(kept) == number:
            break
        if not contains_words(f"{passage.title} {passage.text}", example.answers):
            gold = None if None in example.is_gold else False
            kept.append((passage, gold))
    if len(kept) < number:
        raise InvalidInputError(
            f"question {example.example_id} needs {number} more passages, and the others of its benchmark "
            f"have {len(kept)} without its answer; read more questions, or ask for fewer passages"
        )
    return kept


def _with(example: QaExample, marked: _Marked, change: str) -> QaExample:
    return dataclasses.replace(
        example,
        passages=tuple(passage for passage, _ in marked),
        is_gold=tuple(gold for _, gold in marked),
        variant=", ".join(filter(None, [example.variant, change])),
    )
