"""Where a command's words go: results on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text


def stdout() -> Console:
    """Console of the result."""
    return Console(highlight=False)


def stderr() -> Console:
    """Console of progress, notes and errors."""
    return Console(stderr=True, highlight=False)


def print_json(result: object) -> None:
    """Write the one JSON object of a command that ran with ``--json``."""
    typer.echo(json.dumps(to_json(result), ensure_ascii=False, allow_nan=False))


def to_json(value: Any) -> Any:
    """Turn a result into what JSON can hold: dataclasses to objects, paths to strings, no NaN."""
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(each) for name, each in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # a NaN compares false
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        return [to_json(each) for each in value]
    return value


def print_note(text: str) -> None:
    """Say something to the person at the terminal, beside the result."""
    stderr().print(Text(text))


def print_error(text: str) -> None:
    """Say what went wrong, on one line that scripts can find."""
    stderr().print(Text.assemble(("error:", "bold red"), " ", " ".join(text.split())), soft_wrap=True)


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    return table


def log_to_stderr(*, verbose: bool) -> None:
    """Show the library's log: warnings, and with ``verbose`` what it does step by step."""
    handler = RichHandler(console=stderr(), show_time=verbose, show_path=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("rag_blockcache")
    logger.handlers = [each for each in logger.handlers if not isinstance(each, RichHandler)] + [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def printable(text: str) -> str:
    """Make text of a model or a document safe to show: a terminal obeys control characters."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t"
        else each
        for each in text
    )
