"""``estimate``: what prefilling a corpus costs and brings, before any of it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rag_blockcache.cli.failures import end_with, show_failures
from rag_blockcache.cli.options import (
    Adapter,
    AsJson,
    BlocksSee,
    Codec,
    Device,
    Documents,
    Dtype,
    MaxPassageTokens,
    Overlap,
    PassageFormat,
)
from rag_blockcache.cli.output import facts_table, print_json, stderr, stdout
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.splitting import splitter_for
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rag_blockcache.jobs.estimate import Estimate

_SECONDS_PER_HOUR = 3600.0


def estimate(
    paths: Documents,
    model: Annotated[str, typer.Option(help="Hub id or folder of the language model.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where the index is to lie: does it fit there?"),
    ] = None,
    num_passages: Annotated[
        int,
        typer.Option("--passages", "-k", min=1, help="How many passages a question will be answered from."),
    ] = 10,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(help="Rate of the machine that will prefill, in tokens/s. Measured here if left out."),
    ] = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: Dtype = None,
    passage_format: PassageFormat = None,
    codec: Codec = None,
    blocks_see: BlocksSee = None,
    max_passage_tokens: MaxPassageTokens = None,
    overlap: Overlap = None,
    as_json: AsJson = False,
) -> None:
    """Tell what prefilling documents would take and save, before any work.

    Reads and splits them, and times the model on a few passages: bytes on disk, hours to prefill, time to
    first token (TTFT) with reuse and without, and how often a passage must be used until its prefill has
    paid for itself.
    """
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.jobs.estimate import estimate as work_out

    with (
        BlockCache(
            model,
            None,
            device=device,
            dtype=dtype,
            adapter=adapter,
            passage_format=passage_format or "paper",
            codec=codec or "none",
            blocks_see=blocks_see,
        ) as cache,
        ProgressBar(stderr()) as progress,
    ):
        found = work_out(
            paths,
            cache=cache,
            splitter=splitter_for(cache, max_passage_tokens, overlap),
            directory=out,
            passages_per_question=num_passages,
            tokens_per_second=tokens_per_second,
            progress=progress,
        )
    if as_json:
        print_json(found)
    else:
        _show(found, stdout())
    end_with(not found.failures)


def _show(found: Estimate, console: Console) -> None:
    facts = {
        "corpus": f"{format_count(found.num_documents, 'document')}, "
        f"{found.num_failed_documents:,} unreadable, "
        f"{format_count(found.num_passages, 'passage')}, {format_count(found.num_tokens, 'token')}",
        "on disk": f"{format_bytes(found.num_bytes)}{_room(found)}",
        "prefill": f"{format_seconds(found.prefill_hours * _SECONDS_PER_HOUR)} "
        f"at {found.speed.tokens_per_second:,.0f} tokens/s ({_origin(found)})",
        "first token": f"{format_seconds(found.reuse_ttft_seconds)} with reuse, "
        f"{format_seconds(found.full_ttft_seconds)} without ({found.passages_per_question} passages)",
        "saved": f"{format_seconds(found.full_ttft_seconds - found.reuse_ttft_seconds)} a question",
        "pays off": _break_even(found),
    }
    console.print(facts_table("estimate", facts))
    show_failures(found.failures, console, "cannot be used")


def _origin(found: Estimate) -> str:
    return "measured here" if found.speed.is_measured else "as given"


def _room(found: Estimate) -> str:
    if found.free_bytes is None:
        return ""
    fits = "fits" if found.fits else "does not fit"
    return f", {fits}: {format_bytes(found.free_bytes)} are free"


def _break_even(found: Estimate) -> str:
    if found.break_even_uses is None or found.break_even_bytes_per_second is None:
        return "never: reuse saves no time with this model on this machine"
    times = format_count(found.break_even_uses, "use")
    return (
        f"after {times} of a passage, from a disk of {format_bytes(found.break_even_bytes_per_second)}/s up"
    )
