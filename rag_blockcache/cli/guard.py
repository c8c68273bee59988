"""``guard``: which policy ``auto`` stands for in a directory, what the guard found, and how to begin anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.options import AsJson
from rag_blockcache.cli.output import print_json, print_note, stdout, to_json
from rag_blockcache.errors import StoreError
from rag_blockcache.policy_record import PolicyRecord, WatchedPolicy, read_records, reset_guard


def guard(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of an index, or of a BlockCache.")
    ],
    reset: Annotated[
        bool, typer.Option("--reset", help="Forget what the guard found; a calibration stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which policy auto stands for, and how far policies were found from full attention.

    With --reset, programs that are started from now on use the policies again that were given up.
    """
    if not directory.is_dir():
        raise StoreError(f"there is no directory {directory}; name that of an index, or of a BlockCache")
    names = reset_guard(directory) if reset else []
    records = read_records(directory)
    if as_json:
        print_json({"policies": policies_as_json(records), "reset": names})
        return
    if reset:
        print_note(f"in use again: {', '.join(names)}" if names else "no policy had been given up")
    show_policies(records, stdout())


def policies_as_json(records: Sequence[PolicyRecord]) -> list[dict[str, Any]]:
    """Return records with what is worked out from them."""
    return [
        {
            **to_json(record),
            "watched": [
                {**to_json(seen), "divergence": seen.divergence, "agreement": seen.agreement}
                for seen in record.watched
            ],
        }
        for record in records
    ]


def show_policies(records: Sequence[PolicyRecord], console: Console) -> None:
    """Show what ``auto`` stands for, for each model and prompt, and what was found of each policy."""
    if not records:
        console.print("policy auto stands for the default: nothing was calibrated or compared here")
    for record in records:
        console.print(Text(described(record)), soft_wrap=True)
        if record.watched:
            console.print(_table(record.watched))


def described(record: PolicyRecord) -> str:
    """Say in a line what ``auto`` stands for."""
    used = f"{record.policy} ({record.reason})" if record.policy else "the default"
    return f"policy auto of {record.model or record.fingerprint}: {used}"


def _table(watched: Sequence[WatchedPolicy]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("policy", "answers", "KL a token", "allowed", "same token", ""):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for seen in watched:
        table.add_row(
            seen.name,
            f"{seen.num_answers:,}",
            f"{seen.divergence:.3f}",
            f"{seen.threshold:g}",
            f"{seen.agreement:.2f}",
            "given up" if seen.is_given_up else "",
        )
    return table
