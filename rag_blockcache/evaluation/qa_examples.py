"""A question with its passages and gold answers, and what data sets call the same."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage

Row = Mapping[str, Any]


@dataclass(frozen=True)
class QaExample:
    """One question of a benchmark.

    Attributes:
        example_id: Its name in the data set.
        question: What to answer.
        answers: Gold answers, each of them right; empty where nobody wrote one (accuracy is not measured).
        passages: In the order in which the model reads them.
        is_gold: For each passage, whether the data set marks it as holding the answer; None if it marks none.
        dataset: Name of the benchmark.
        variant: How the passages were rearranged; empty as they came.
    """

    example_id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    is_gold: tuple[bool | None, ...]
    dataset: str
    variant: str = ""

    @property
    def gold_position(self) -> int | None:
        """Place of the first gold passage, from 1; None if none is marked."""
        return next((place for place, gold in enumerate(self.is_gold, start=1) if gold), None)

    @property
    def key(self) -> str:
        """Hash of all that an answer and its marks depend on, 32 hexadecimal digits."""
        shown = [[passage.title, passage.text] for passage in self.passages]
        content = json.dumps(
            [self.dataset, self.variant, self.example_id, self.question, self.answers, shown, self.is_gold]
        )
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def read_row(row: Row, *, dataset: str, table: Mapping[Any, Row] | None = None, number: int = 0) -> QaExample:
    """Turn one record into an example, whichever of the known forms it has.

    The forms: ``passages`` (ours), ``pids`` (ours, with the passages in a table), ``ctxs`` (DPR, and what
    retrievers write), ``positive_passages`` (Tevatron), ``context`` with ``supporting_facts`` (HotpotQA and
    2WikiMultihopQA, as published and as on the Hugging Face hub).

    Args:
        row: The record.
        dataset: Name of the benchmark, where the record has none.
        table: Passages by ``pid``.
        number: Of the record in its source; names one that has no name.

    Raises:
        InvalidInputError: If it has none of these forms, or a field cannot be used.
    """
    question = row.get("question", row.get("query"))
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"there is no question in it, only {sorted(row)}; name it 'question'")
    passages, is_gold = _passages(row, table)
    if not passages:
        raise InvalidInputError("it has no passages; there is nothing to reuse without any")
    named = next((row[name] for name in ("id", "_id", "query_id", "qid") if row.get(name)), number)
    return QaExample(
        example_id=str(named),
        question=question.strip(),
        answers=_answers(row),
        passages=tuple(passages),
        is_gold=tuple(is_gold),
        dataset=str(row.get("dataset") or dataset),
    )


def _answers(row: Row) -> tuple[str, ...]:
    """Return the gold answers, however the record writes them; none is allowed."""
    given = row.get("answers", row.get("answer", ()))
    if isinstance(given, Mapping):  # TriviaQA: the answer and its other names
        given = [given.get("value"), *given.get("aliases", ())]
    given = [given] if isinstance(given, str) else given or ()
    if not all(isinstance(answer, str) for answer in given):
        raise InvalidInputError(f"its answers are {given!r}; they must be strings")
    return tuple(dict.fromkeys(answer for answer in given if answer.strip()))


def _passages(row: Row, table: Mapping[Any, Row] | None) -> tuple[list[Passage], list[bool | None]]:
    if "passages" in row:
        return _of_rows(row["passages"], [each.get("is_gold") for each in row["passages"]])
    if "pids" in row:
        return _of_table(row, table)
    if "ctxs" in row:
        return _of_rows(row["ctxs"], [each.get("is_gold") for each in row["ctxs"]])
    if "positive_passages" in row:
        return _of_positives(row)
    if "context" in row and "supporting_facts" in row:
        return _of_paragraphs(row)
    raise InvalidInputError(
        f"its passages were not found among {sorted(row)}; known are 'passages', 'pids', 'ctxs', "
        "'positive_passages', and 'context' with 'supporting_facts'"
    )


def _of_rows(rows: Sequence[Row], is_gold: Sequence[bool | None]) -> tuple[list[Passage], list[bool | None]]:
    pairs = [(_passage(each), gold) for each, gold in zip(rows, is_gold, strict=True)]
    return [passage for passage, _ in pairs], [gold for _, gold in pairs]


def _passage(row: Row) -> Passage:
    text = row.get("text")
    if not isinstance(text, str):
        raise InvalidInputError(f"a passage has no text, only {sorted(row)}; name it 'text'")
    return Passage(text, str(row.get("title") or ""))


def _of_table(row: Row, table: Mapping[Any, Row] | None) -> tuple[list[Passage], list[bool | None]]:
    missing = [pid for pid in row["pids"] if pid not in (table or {})]
    if table is None or missing:
        raise InvalidInputError(
            f"it names passages by pid, and {missing[:3]} are not in the table; put passages.jsonl or "
            "passages.jsonl.gz beside the file"
        )
    gold = row.get("is_gold") or [None] * len(row["pids"])
    return _of_rows([table[pid] for pid in row["pids"]], gold)


def _of_positives(row: Row, num_passages: int = 10) -> tuple[list[Passage], list[bool | None]]:
    """Take one positive, negatives up to ten passages, and put the positive anywhere, each time the same."""
    negatives = row.get("negative_passages") or []
    chosen = [(each, True) for each in row["positive_passages"][:1]]
    chosen += [(each, False) for each in negatives[: num_passages - len(chosen)]]
    random.Random(str(row.get("query", row.get("question")))).shuffle(chosen)
    return _of_rows([each for each, _ in chosen], [gold for _, gold in chosen])


def _of_paragraphs(row: Row) -> tuple[list[Passage], list[bool | None]]:
    """Read paragraphs of sentences, as ``[title, sentences]`` pairs or as one list of each."""
    context, facts = row["context"], row["supporting_facts"]
    if isinstance(context, Mapping):
        context = list(zip(context["title"], context["sentences"], strict=True))
    gold = set(facts["title"]) if isinstance(facts, Mapping) else {title for title, *_ in facts}
    joined = [(title, " ".join(sentence.strip() for sentence in sentences)) for title, sentences in context]
    kept = [(title, text) for title, text in joined if text.strip()]
    return [Passage(text, title) for title, text in kept], [title in gold for title, _ in kept]
