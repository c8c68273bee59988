"""What could not be done: shown at the end, and told by the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.output import printable
from rag_blockcache.cli.units import format_count

if TYPE_CHECKING:
    from rag_blockcache.jobs.index_report import Failure

_EXIT_PROBLEMS = 1
_SHOWN = 50


def show_failures(failures: Sequence[Failure], console: Console, what: str) -> None:
    """List documents and reasons; the JSON output has all of them."""
    if not failures:
        return
    table = Table(box=None, pad_edge=False, title_justify="left", show_header=False)
    table.title = Text(f"{len(failures):,} {what}")
    table.add_column(style="yellow", overflow="fold")
    table.add_column(overflow="fold")
    for failure in failures[:_SHOWN]:
        table.add_row(Text(printable(failure.source)), Text(printable(failure.reason)))
    console.print(table)
    if len(failures) > _SHOWN:
        console.print(f"and {format_count(len(failures) - _SHOWN, 'other')}; --json lists all", markup=False)


def end_with(is_well: bool) -> None:
    """End a command that has done its work, with exit code 1 if there were problems."""
    if not is_well:
        raise typer.Exit(_EXIT_PROBLEMS)
