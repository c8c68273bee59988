"""Files to examples: a question with passages and its answer, a chat that ends with one, or general text."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage

_TABLES = ("passages.jsonl.gz", "passages.jsonl")


@dataclass(frozen=True)
class QuestionExample:
    """A question over passages.

    Attributes:
        question: As a user asks it.
        passages: As they stand in the file.
        is_needed: For each passage, whether the answer rests on it. Where the file does not say, all do.
        answer: What the model learns to say; empty if it is to answer itself.
    """

    question: str
    passages: tuple[Passage, ...]
    is_needed: tuple[bool, ...]
    answer: str


@dataclass(frozen=True)
class ChatExample:
    """A chat about anything.

    Attributes:
        messages: All but the last.
        answer: The last message, the assistant's.
    """

    messages: tuple[Mapping[str, str], ...]
    answer: str


@dataclass(frozen=True)
class TextExample:
    """Text about anything, of which the model keeps to say what it said before.

    Attributes:
        text: As it stands in the file.
    """

    text: str


Example = QuestionExample | ChatExample | TextExample


@dataclass(frozen=True)
class DataFile:
    """The examples of one file.

    Attributes:
        name: Of the file, without its folder.
        sha256: Of its bytes.
        passages_sha256: Of the file that its passages were looked up in; None if it holds them itself.
        examples: In the order of the file.
    """

    name: str
    sha256: str
    passages_sha256: str | None
    examples: Sequence[Example]


def read_data(path: Path, passages: Path | None = None, *, needs_answers: bool = True) -> DataFile:
    """Read the examples of a file of JSON lines, gzipped or not.

    A line is ``{"question", "answers" or "answer", "passages": [{"title"?, "text", "is_gold"?,
    "has_answer"?}]}``, where a passage may be a string; or the same with ``pids`` instead of ``passages``,
    which name rows ``{"pid", "title"?, "text"}`` of another file, and lists ``is_gold`` and ``has_answer``;
    or ``{"messages": [{"role", "content"}]}``, ending with the assistant; or ``{"text"}``. Other fields are
    passed over.

    Args:
        path: The file.
        passages: Where to look up ``pids``; None takes ``passages.jsonl[.gz]`` in the same folder.
        needs_answers: Whether a question without an answer is an error.

    Raises:
        InvalidInputError: If a line cannot be used; the message names it.
    """
    table_path = cache(lambda: _table_of(path, passages))
    examples: list[Example] = []
    for number, row in _rows(path):
        try:
            example = _example(row, table_path)
            if needs_answers and not isinstance(example, TextExample) and not example.answer:
                raise ValueError(
                    "it has no answer; give it 'answers' (a list, the first one is learned) or 'answer', "
                    "or let the model answer with --own-answers"
                )
            examples.append(example)
        except (KeyError, TypeError, ValueError) as error:  # InvalidInputError too
            problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise InvalidInputError(
                f"line {number} of {path.name} cannot be trained on: {problem}"
            ) from error
    if not examples:
        raise InvalidInputError(f"{path.name} holds no examples; give a file that does, or leave it out")
    looked_up = sha256_of(table_path()) if table_path.cache_info().currsize else None
    return DataFile(path.name, sha256_of(path), looked_up, examples)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the content of each line that is not empty."""
    if not path.is_file():
        raise InvalidInputError(f"there is no file {path}; give .jsonl or .jsonl.gz files")
    is_packed = path.suffix == ".gz"
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if is_packed else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"an object is needed, got {type(row).__name__}")
                    yield number, row
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InvalidInputError(f"{path.name} cannot be read at line {number}: {error}; repair it") from error


def _table_of(path: Path, passages: Path | None) -> Path:
    if passages is not None:
        return passages
    for name in _TABLES:
        if (path.parent / name).is_file():
            return path.parent / name
    raise InvalidInputError(
        f"{path.name} names passages by pid, and {_TABLES[0]} is not beside it; name it with --passages"
    )


@lru_cache(maxsize=1)
def _read_table(path: Path) -> dict[int | str, Passage]:
    """Read passages by pid, once for all files that share them; those without text are left out."""
    table = {}
    for number, row in _rows(path):
        if "pid" not in row:
            raise InvalidInputError(f"line {number} of {path.name} has no pid; give the file of passages")
        if str(row.get("text") or "").strip():
            table[row["pid"]] = Passage(row["text"], title=row.get("title") or "")
    return table


def _example(row: Mapping[str, Any], table_path: Callable[[], Path]) -> Example:
    if "messages" in row:
        return _chat(row)
    if "text" in row and "question" not in row:
        return TextExample(_text(row, "text"))
    return _question(row, table_path)


def _question(row: Mapping[str, Any], table_path: Callable[[], Path]) -> QuestionExample:
    if "pids" in row:
        table = _read_table(table_path())
        flags = [row.get(name) or [None] * len(row["pids"]) for name in ("is_gold", "has_answer")]
        found = [(table.get(pid), *said) for pid, *said in zip(row["pids"], *flags, strict=True)]
    else:
        found = [_inline(passage) for passage in row["passages"]]
    kept = [each for each in found if each[0] is not None]
    return QuestionExample(
        question=_text(row, "question"),
        passages=tuple(passage for passage, *_ in kept),
        is_needed=_needed([is_gold for _, is_gold, _ in kept], [holds for _, _, holds in kept]),
        answer=_answer(row),
    )


def _inline(passage: Any) -> tuple[Passage | None, Any, Any]:
    row = {"text": passage} if isinstance(passage, str) else passage
    shown = Passage(row["text"], title=row.get("title") or "") if row["text"].strip() else None
    return shown, row.get("is_gold"), row.get("has_answer")


def _needed(is_gold: Sequence[bool | None], has_answer: Sequence[bool | None]) -> tuple[bool, ...]:
    """Return which passages the answer rests on: gold ones, else those that hold it, else all."""
    for said in (is_gold, has_answer):
        if any(said):
            return tuple(bool(each) for each in said)
    return (True,) * len(is_gold)


def _answer(row: Mapping[str, Any]) -> str:
    given = row.get("answers") or [row.get("answer")]
    return given[0].strip() if isinstance(given[0], str) else ""


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"its {name} is empty; give it one, or leave the line out")
    return str(row[name])


def _chat(row: Mapping[str, Any]) -> ChatExample:
    messages = [
        {"role": message["role"], "content": _text(message, "content")} for message in row["messages"]
    ]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("its messages must end with the assistant's, behind one of the user at least")
    return ChatExample(tuple(messages[:-1]), messages[-1]["content"])
