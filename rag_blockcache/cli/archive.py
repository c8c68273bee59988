"""``export`` and ``import``: one file that carries a prefilled index to another machine."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rag_blockcache.cli.opening import fingerprint_of
from rag_blockcache.cli.options import Adapter, AsJson, Device, IndexDirectory
from rag_blockcache.cli.output import facts_table, print_json, stderr, stdout
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rag_blockcache.jobs.archive import ArchiveReport


def export_index(
    directory: IndexDirectory,
    archive: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Archive to write, such as kv.tar; must not exist. .tar.gz is slow, hardly smaller.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Write an index into one file: passages, vectors, prefilled blocks.

    Questions may be asked meanwhile; jobs may not run. The file appears when it is complete.
    """
    from rag_blockcache.jobs.archive import export_index as export

    with ProgressBar(stderr()) as progress:
        report = export(directory, archive, progress=progress)
    if as_json:
        print_json(report)
    else:
        _show(report, f"exported to {report.archive}", stdout())


def import_index(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="Archive that export wrote.")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory to make; must be empty if it exists.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the model to use it with; refused if it is another one."),
    ] = None,
    adapter: Adapter = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Unpack an index that was exported, checking every file.

    With --model, an index that was made with another model is refused before anything is unpacked; without,
    the first question finds out. The directory appears when it is complete.
    """
    from rag_blockcache.jobs.archive import import_index as unpack

    fingerprint = _fingerprint(archive, model, adapter, device) if model else None
    with ProgressBar(stderr()) as progress:
        report = unpack(archive, directory, fingerprint=fingerprint, progress=progress)
    if as_json:
        print_json(report)
    else:
        _show(report, f"imported into {report.directory}", stdout())


def _fingerprint(archive: Path, model: str, adapter: str | None, device: str | None) -> str:
    """Load a model as the archive was made with it, and return its fingerprint."""
    from rag_blockcache.jobs.archive_file import reported
    from rag_blockcache.jobs.archive_reader import read_settings

    with reported(archive), tarfile.open(archive, "r|*") as tar:
        settings = read_settings(tar, archive)
    return fingerprint_of(
        model,
        adapter=adapter or settings.adapter or None,
        dtype=settings.dtype or None,
        device=device,
        codec=settings.codec,
        blocks_see=settings.blocks_see,
    )


def _show(report: ArchiveReport, title: str, console: Console) -> None:
    facts = {
        "files": f"{format_count(report.num_files, 'file')}, {format_bytes(report.num_bytes)}",
        "took": f"{format_seconds(report.seconds)}",
        "model": report.settings.model,
        "embedder": report.settings.embedder,
        "fingerprint": report.settings.fingerprint,
    }
    console.print(facts_table(title, facts))
