"""``status``, ``verify`` and ``gc``: what an index holds, whether it is whole, what in it nobody needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rag_blockcache.cli.failures import end_with, show_failures
from rag_blockcache.cli.guard import policies_as_json, show_policies
from rag_blockcache.cli.opening import open_index
from rag_blockcache.cli.options import AsJson, Device, Embedder, IndexDirectory, Model
from rag_blockcache.cli.output import facts_table, print_json, print_note, stderr, stdout, to_json
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds
from rag_blockcache.policy_record import read_records

if TYPE_CHECKING:
    from rag_blockcache.jobs.maintenance import GarbageReport, IndexStatus
    from rag_blockcache.jobs.verification import VerifyReport

_SHOWN = 10  # of a list that may be long


def status(directory: IndexDirectory, as_json: AsJson = False) -> None:
    """Show what an index holds and what is left to do; no model is loaded."""
    from rag_blockcache.jobs.maintenance import status as status_of

    found, policies = status_of(directory), read_records(directory)
    if as_json:
        print_json({**to_json(found), "policies": policies_as_json(policies)})
    else:
        _show_status(found, stdout())
        show_policies(policies, stdout())


def _show_status(found: IndexStatus, console: Console) -> None:
    counts, made = found.counts, found.settings
    done = counts.num_blocks - counts.num_pending_blocks
    facts = {
        "documents": f"{counts.num_documents:,}",
        "passages": f"{counts.num_passages:,} ({counts.num_shared_passages:,} in several documents)",
        "prefilled": f"{done:,} of {format_count(counts.num_blocks, 'block')}",
        "left to do": _left(found),
        "tokens": f"{counts.num_tokens:,}",
        "on disk": f"{format_bytes(found.num_bytes)} ({format_bytes(found.num_block_bytes)} of blocks, "
        f"{format_bytes(found.num_index_bytes)} of passages and vectors)",
    }
    if made is not None:
        facts |= {
            "model": f"{made.model} ({made.dtype or 'dtype of its files'})",
            "adapter": made.adapter or "none",
            "embedder": made.embedder,
            "format": f"{made.passage_format}, {made.splitting}",
            "codec": made.codec,
            "blocks see": made.blocks_see,
            "fingerprint": made.fingerprint,
        }
    console.print(facts_table(f"index {found.directory}", facts))
    show_failures(found.failures, console, "could not become passages")


def _left(found: IndexStatus) -> str:
    counts = found.counts
    if not counts.num_pending_passages and not counts.num_pending_blocks:
        return "nothing"
    passages = format_count(counts.num_pending_passages, "passage")
    blocks = format_count(counts.num_pending_blocks, "block")
    return f"{passages} to embed, {blocks} ({counts.num_pending_tokens:,} tokens) to prefill"


def verify(
    directory: IndexDirectory,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is damaged, and encode and embed it again.")
    ] = False,
    model: Model = None,
    embedder: Embedder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Check every block against its checksum, and every passage against the index.

    Reads all of it, at the speed of the disk. The exit code is 1 if something was found and not repaired.
    """
    from rag_blockcache.jobs.verification import verify as verify_index
    from rag_blockcache.manifest import Manifest

    with (
        open_index(directory, model=model, embedder=embedder, device=device) as (cache, retriever),
        closing(Manifest(directory)) as manifest,
        ProgressBar(stderr()) as progress,
    ):
        report = verify_index(
            cache=cache, retriever=retriever, manifest=manifest, repair=repair, progress=progress
        )
    is_well = report.is_sound or (repair and not report.failures)
    if as_json:
        print_json({**to_json(report), "is_sound": report.is_sound})
    else:
        _show_verified(report, repair, stdout())
    end_with(is_well)


def _show_verified(report: VerifyReport, repair: bool, console: Console) -> None:
    facts = {
        "checked": f"{format_count(report.num_blocks, 'block')}, "
        f"{format_count(report.num_passages, 'passage')} in {format_seconds(report.seconds)}",
        "damaged blocks": _some(report.damaged_blocks),
        "missing blocks": _some(report.missing_blocks),
        "missing passages": _some(report.missing_passages),
        "changed passages": _some(report.changed_passages),
        "index": "; ".join(report.index_problems) or "sound",
    }
    if repair:
        blocks = format_count(report.num_repaired_blocks, "block")
        facts["repaired"] = f"{blocks}, {format_count(report.num_repaired_passages, 'passage')}"
    console.print(facts_table("sound" if report.is_sound else "problems found", facts))
    show_failures(report.failures, console, "could not be repaired")
    if not report.is_sound and not repair:
        print_note("run the same command with --repair to mend it")


def _some(ids: Sequence[str]) -> str:
    if not ids:
        return "none"
    more = f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
    return f"{len(ids):,}: {', '.join(ids[:_SHOWN])}{more}"


def gc(
    directory: IndexDirectory,
    unknown_blocks: Annotated[
        bool,
        typer.Option(
            "--unknown-blocks",
            help="Delete blocks too that no document refers to, such as of other programs.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
    model: Model = None,
    embedder: Embedder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Delete what no document refers to any more, and free its space.

    Questions may be asked meanwhile; jobs may not run.
    """
    from rag_blockcache.jobs.maintenance import collect_garbage
    from rag_blockcache.manifest import Manifest

    with (
        open_index(directory, model=model, embedder=embedder, device=device) as (cache, retriever),
        closing(Manifest(directory)) as manifest,
    ):
        report = collect_garbage(
            cache=cache,
            retriever=retriever,
            manifest=manifest,
            unknown_blocks=unknown_blocks,
            dry_run=dry_run,
        )
    if as_json:
        print_json(report)
    else:
        _show_collected(report, unknown_blocks, stdout())


def _show_collected(report: GarbageReport, unknown_blocks: bool, console: Console) -> None:
    fate = "" if unknown_blocks else ", kept; --unknown-blocks deletes them"
    facts = {
        "passages": f"{report.num_passages:,}",
        "blocks": f"{report.num_blocks:,}",
        "unknown blocks": f"{report.num_unknown_blocks:,}{fate if report.num_unknown_blocks else ''}",
        "lost blocks": f"{report.num_lost_blocks:,}",
    }
    if not report.is_dry_run:
        facts["freed"] = f"{format_bytes(report.num_bytes)} in {format_seconds(report.seconds)}"
    console.print(facts_table("would be deleted" if report.is_dry_run else "deleted", facts))
