"""Public benchmarks by name, through the ``datasets`` library; nothing is fetched before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.evaluation.qa_examples import QaExample, read_row
from rag_blockcache.evaluation.qa_files import read_examples

_PREFIX = "hf:"


@dataclass(frozen=True)
class PublicSet:
    """Where a benchmark is on the Hugging Face hub.

    Attributes:
        path: Repository.
        split: Which part of it.
        config: Which of its configurations; None for the only one.
        data_file: A file of JSON lines, for repositories that are read by a script of their own.
    """

    path: str
    split: str
    config: str | None = None
    data_file: str | None = None


PUBLIC_SETS = {
    "nq": PublicSet("Tevatron/wikipedia-nq", "dev", data_file="nq-dev.jsonl.gz"),
    "triviaqa": PublicSet("Tevatron/wikipedia-trivia", "dev", data_file="trivia-dev.jsonl.gz"),
    "hotpotqa": PublicSet("hotpotqa/hotpot_qa", "validation", config="distractor"),
    "2wiki": PublicSet("framolfese/2WikiMultihopQA", "validation"),
}


def load_benchmark(name: str, limit: int | None = None) -> list[QaExample]:
    """Read a benchmark from a file, or from the Hugging Face hub.

    Args:
        name: A file (see ``read_examples``); ``hf:`` and a name in ``PUBLIC_SETS``; or ``hf:``, a
            repository or folder of data, ``:`` and a split, for any whose records have a known form.
        limit: Take so many from the start; None takes all.

    Raises:
        InvalidInputError: If it is unknown or cannot be read.
        MissingDependencyError: If the hub is asked for and ``datasets`` is not installed.
    """
    if not name.startswith(_PREFIX):
        return read_examples(name, limit)
    wanted = name.removeprefix(_PREFIX)
    if wanted in PUBLIC_SETS:
        return load_public(PUBLIC_SETS[wanted], wanted, limit)
    match = re.fullmatch(r"(.+):([\w.]+)", wanted)
    if match is None:
        raise InvalidInputError(
            f"{name!r} is no benchmark; use a file, one of "
            f"{', '.join(_PREFIX + known for known in PUBLIC_SETS)}, or {_PREFIX}owner/name:split"
        )
    return load_public(PublicSet(match[1], match[2]), Path(match[1]).name, limit)


def load_public(source: PublicSet, dataset: str, limit: int | None = None) -> list[QaExample]:
    """Stream the first records of a benchmark on the hub, or in a local folder of the same form."""
    examples = []
    for number, row in enumerate(islice(_stream(source), limit), start=1):
        try:
            examples.append(read_row(row, dataset=dataset, number=number))
        except InvalidInputError as error:
            raise InvalidInputError(f"record {number} of {source.path} cannot be used: {error}") from error
    if not examples:
        raise InvalidInputError(f"{source.path} ({source.split}) has no records; name another split")
    return examples


def _stream(source: PublicSet) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            "public benchmarks are read with the library datasets, which is not installed; run: "
            "pip install 'rag_blockcache[benchmarks]'"
        ) from error
    local = Path(source.path).is_dir()
    if source.data_file is not None:
        where = str(Path(source.path) / source.data_file)
        where = where if local else f"hf://datasets/{source.path}/{source.data_file}"
        arguments: dict[str, Any] = {"path": "json", "data_files": where, "split": "train"}
    else:
        arguments = {"path": source.path, "name": source.config, "split": source.split}
    try:
        return cast("Iterable[dict[str, Any]]", load_dataset(**arguments, streaming=True))
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise InvalidInputError(
            f"{source.path} ({source.data_file or source.split}) cannot be read: {error}; check its name and "
            "your connection, or download it and give the file"
        ) from error
