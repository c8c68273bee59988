"""Questions that the model itself asks about passages of an index, with what the index finds for them."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_blockcache.block_cache import BlockCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage
from rag_blockcache.request import Chat, Request, Text
from rag_blockcache.retriever import Retriever

_ASK = "Write one short question that can be answered from the text above. Write only the question."
_COMPLETE = "A question that can be answered from the text above:"
_LABEL = re.compile(r"^.*question\s*:", re.IGNORECASE)
_QUESTION = re.compile(r".{8,300}?[?\uff1f\u061f]")  # with the marks of Chinese and Arabic
_BATCH = 8
_MAX_TOKENS = 48
_TRIES = 3  # passages for a question: of some, nothing can be asked


def write_questions(
    path: Path | str,
    cache: BlockCache,
    retriever: Retriever,
    *,
    number: int,
    num_passages: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a file of questions, as ``read_examples`` reads it, about passages drawn from an index.

    The model is asked, under full attention, for a question that a passage answers. The other passages of
    the prompt are those that the index finds for this question, in the order of ``rag-blockcache ask``: the
    most similar last. The same index gives the same passages, and questions that the file has already are
    not asked for again.

    Args:
        path: File of JSON lines; replaced as a whole.
        cache: Has the model.
        retriever: Finds passages.
        number: How many questions.
        num_passages: In each prompt.
        progress: Called after each batch with questions written and wanted.

    Returns:
        How many questions there are; fewer than wanted if passages ran out.

    Raises:
        InvalidInputError: If not one question can be made of the passages.
    """
    path = Path(path)
    known, drawn = _known(path), _drawn(retriever, number * _TRIES)
    records: list[dict[str, Any]] = []
    while drawn and len(records) < number:
        size = min(_BATCH, number - len(records))
        batch, drawn = drawn[:size], drawn[size:]
        asked = _asked(cache, batch, known)
        records += [_record(*pair, retriever, num_passages) for pair in asked if pair[1]]
        if progress is not None:
            progress(len(records), number)
    if not records:
        raise InvalidInputError(
            "the model made no question of the passages of this index; give questions with --data"
        )
    _write(path, records)
    return len(records)


def _known(path: Path) -> dict[str, str]:
    """Return the questions of an earlier run, by the content of their passage."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["id"]: record["question"] for record in map(json.loads, lines)}


def _drawn(retriever: Retriever, number: int) -> list[Passage]:
    """Draw passages by the hash of their ids, so that others stay drawn when some come and go."""
    ids = heapq.nsmallest(number, retriever, key=lambda name: hashlib.blake2b(name.encode()).digest())
    return retriever.get(ids)


def _asked(
    cache: BlockCache, passages: Sequence[Passage], known: dict[str, str]
) -> list[tuple[Passage, str]]:
    """Return a question about each passage; empty where the model had none."""
    new = {each.content_id: _request(cache, each) for each in passages if each.content_id not in known}
    new = {name: request for name, request in new.items() if _fits(cache, request)}
    options: dict[str, Any] = {"max_new_tokens": _MAX_TOKENS, "do_sample": False, "num_beams": 1}
    answers = cache.answer_batch(list(new.values()), policy="full", **options)
    found = {name: question_in(answer.text) for name, answer in zip(new, answers, strict=True)} | known
    return [(passage, found.get(passage.content_id, "")) for passage in passages]


def _fits(cache: BlockCache, request: Request) -> bool:
    return sum(map(len, cache.segments(request))) + _MAX_TOKENS <= cache.model.max_length


def _request(cache: BlockCache, passage: Passage) -> Request:
    shown = f"{passage.title}\n{passage.text}".strip()
    if cache.tokenizer.chat_template is None:
        return Text(f"{shown}\n\n{_COMPLETE}", finds_passages=False)
    return Chat([{"role": "user", "content": f"{shown}\n\n{_ASK}"}], finds_passages=False)


def question_in(text: str) -> str:
    """Return the first question in what a model wrote; empty if there is none."""
    for line in text.splitlines():
        found = _QUESTION.match(_LABEL.sub("", line).strip(" \"'*`"))
        if found is not None:
            return found[0]
    return ""


def _record(passage: Passage, question: str, retriever: Retriever, num_passages: int) -> dict[str, Any]:
    """Put the passage that a question is about among those that are found for it, where it belongs."""
    found = [result.passage for result in retriever.search(question, num_passages)]
    if passage not in found:
        found = [*found[: num_passages - 1], passage]
    shown = [{"title": each.title, "text": each.text, "is_gold": each == passage} for each in reversed(found)]
    return {"id": passage.content_id, "question": question, "passages": shown}


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)
