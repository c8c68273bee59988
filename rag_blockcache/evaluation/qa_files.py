"""Benchmarks from files: JSON and JSON lines, plain or compressed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.qa_examples import QaExample, Row, read_row

_TABLES = ("passages.jsonl.gz", "passages.jsonl")


def read_examples(path: Path | str, limit: int | None = None) -> list[QaExample]:
    """Read a benchmark from a file.

    Args:
        path: ``.jsonl`` or ``.json`` (a list of records), either of them with ``.gz`` behind it. Records that
            name passages by ``pid`` find them in ``passages.jsonl`` or ``passages.jsonl.gz`` in its folder.
        limit: Take so many from the start; None takes all.

    Raises:
        InvalidInputError: If a record cannot be read; the message names its line.
    """
    path = Path(path)
    dataset = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    table: Mapping[Any, Row] | None = None
    examples = []
    for number, row in islice(_rows(path), limit):
        if "pids" in row and table is None:
            table = _table(path.parent)
        try:
            examples.append(read_row(row, dataset=dataset, table=table, number=number))
        except InvalidInputError as error:
            raise InvalidInputError(f"record {number} of {path} cannot be used: {error}") from error
    if not examples:
        raise InvalidInputError(f"{path} has no records; give a benchmark with at least one question")
    return examples


def _table(folder: Path) -> dict[Any, Row] | None:
    found = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    return None if found is None else {row["pid"]: row for _, row in _rows(found)}


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the records of a file with their numbers, from 1."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        if path.name.removesuffix(".gz").endswith(".json"):
            lines = enumerate(_parsed(file.read(), f"{path}"), start=1)
            yield from ((number, _record(row, number, path)) for number, row in lines)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _record(_parsed(line, f"record {number} of {path}"), number, path)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{where} is no JSON ({error}); a .jsonl file has one object a line, a .json file one list"
        ) from error


def _record(row: Any, number: int, path: Path) -> Row:
    if not isinstance(row, Mapping):
        raise InvalidInputError(f"record {number} of {path} is {type(row).__name__}; an object is needed")
    return row
