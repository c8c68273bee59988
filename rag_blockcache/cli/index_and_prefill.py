"""``index-and-prefill``: documents in, an index out that ``ask`` answers from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rag_blockcache.cli.failures import end_with, show_failures
from rag_blockcache.cli.opening import recorded_settings
from rag_blockcache.cli.options import (
    Adapter,
    AsJson,
    BlocksSee,
    Codec,
    Device,
    DiskBudget,
    Documents,
    Dtype,
    MaxPassageTokens,
    Overlap,
    PassageFormat,
)
from rag_blockcache.cli.output import facts_table, print_json, print_note, stderr, stdout
from rag_blockcache.cli.parsing import parse_prefill, parse_shard
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.splitting import splitter_for
from rag_blockcache.cli.units import format_bytes, format_count, format_seconds
from rag_blockcache.errors import IndexMismatchError, InvalidInputError

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.index_records import IndexSettings
    from rag_blockcache.jobs.index_report import IndexReport
    from rag_blockcache.retriever import Retriever


def index_and_prefill(
    paths: Documents,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Directory of the index; made if missing.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the language model. Needed for a new index.")
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of a sentence-transformers model. Needed for a new index."),
    ] = None,
    adapter: Adapter = None,
    device: Device = None,
    dtype: Dtype = None,
    preamble: Annotated[
        str | None, typer.Option(help="Text before the passages. The passage format's own if left out.")
    ] = None,
    passage_format: PassageFormat = None,
    codec: Codec = None,
    blocks_see: BlocksSee = None,
    max_passage_tokens: MaxPassageTokens = None,
    overlap: Overlap = None,
    index_factory: Annotated[
        str | None,
        typer.Option(
            help="FAISS index: Flat (exact), HNSW32, IVF1024,Flat. Kinds with IVF or PQ are exact until "
            "there are passages enough to train them. Flat for a new index if left out."
        ),
    ] = None,
    prefill: Annotated[
        str,
        typer.Option(
            metavar="all|none|N",
            help="Which passages to prefill now, N for the N hottest: those used most, then those that most "
            "documents hold. The rest is prefilled when first used.",
        ),
    ] = "all",
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Take only the I-th of N parts of the documents.")
    ] = None,
    disk_budget: DiskBudget = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring an index up to date with documents: split, embed, prefill.

    Only what is left to do is done: new and changed documents are indexed, those gone from the given folders
    are removed, what is stored is not encoded again. Interrupt it at any time; the same command goes on.
    For an index that exists, options left out are those it was made with.
    """
    chosen, part = parse_prefill(prefill), parse_shard(shard) if shard else None
    recorded = recorded_settings(out)
    options = _Options.complete(
        recorded,
        model=model,
        embedder=embedder,
        adapter=adapter,
        dtype=dtype,
        preamble=preamble,
        passage_format=passage_format,
        codec=codec,
        blocks_see=blocks_see,
    )
    from rag_blockcache.jobs.index_and_prefill import check_origin, settings_of
    from rag_blockcache.jobs.index_and_prefill import index_and_prefill as run
    from rag_blockcache.manifest import Manifest

    check_origin(recorded, out)
    with (
        _place(out, dry_run) as directory,
        options.open(directory, device, disk_budget, index_factory) as (cache, retriever),
        closing(Manifest(directory)) as manifest,
        ProgressBar(stderr()) as progress,
    ):
        splitting = recorded.splitting if recorded else ""
        splitter = splitter_for(cache, max_passage_tokens, overlap, recorded=splitting)
        report = run(
            paths,
            cache=cache,
            retriever=retriever,
            manifest=manifest,
            splitter=splitter,
            settings=options.record(settings_of(cache, retriever, splitter)),
            prefill=chosen,
            shard=part,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json(report)
    else:
        _show(report, out, stdout())
    end_with(not report.failures)


@contextmanager
def _place(out: Path, dry_run: bool) -> Iterator[Path]:
    """Yield the directory to work in; a dry run of a new index must not make one."""
    if not dry_run or out.exists():
        yield out
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


@dataclass(frozen=True)
class _Options:
    """What an index is made with: as asked for, else as it is on record."""

    model: str
    embedder: str
    adapter: str | None
    dtype: str | None
    preamble: str | None
    passage_format: str
    codec: str
    blocks_see: str | None

    @classmethod
    def complete(cls, recorded: IndexSettings | None, **asked: Any) -> _Options:
        """Fill in what was left out.

        Raises:
            InvalidInputError: If there is no index yet, and model or embedder is not given.
            IndexMismatchError: If the index has another preamble.
        """
        if recorded is None:
            missing = " and ".join(f"--{name}" for name in ("model", "embedder") if not asked[name])
            if missing:
                raise InvalidInputError(f"a new index needs {missing}; name a hub id or a folder")
            usual = {"passage_format": "paper", "codec": "none"}
            return cls(**asked | {name: asked[name] or value for name, value in usual.items()})
        if asked["preamble"] not in (None, recorded.preamble):
            raise IndexMismatchError(
                f"the index was made with the preamble {recorded.preamble!r}, not {asked['preamble']!r}; "
                "leave --preamble out, or index into another directory"
            )
        before = {name: getattr(recorded, name) for name in asked}
        kept = before | {"adapter": recorded.adapter or None, "dtype": recorded.dtype or None}
        return cls(**{name: kept[name] if value is None else value for name, value in asked.items()})

    @contextmanager
    def open(
        self, directory: Path, device: str | None, disk_budget_bytes: int | None, index_factory: str | None
    ) -> Iterator[tuple[BlockCache, Retriever]]:
        """Load the model over the blocks, and open the passages."""
        from rag_blockcache.block_cache import BlockCache
        from rag_blockcache.retriever import Retriever

        cache = BlockCache(
            self.model,
            directory,
            device=device,
            dtype=self.dtype,
            adapter=self.adapter,
            preamble=self.preamble,
            passage_format=self.passage_format,
            codec=self.codec,
            blocks_see=self.blocks_see,
            disk_budget_bytes=disk_budget_bytes,
            # Nobody asks this process a question: what is written has no use in its memory.
            memory_budget_bytes=0,
            device_budget_bytes=0,
            context_budget_bytes=0,
        )
        with cache:
            retriever = Retriever(
                directory / "index", embedder=self.embedder, index_factory=index_factory, device=device
            )
            with closing(retriever):
                yield cache, retriever

    def record(self, found: IndexSettings) -> IndexSettings:
        """Complete what goes on record by names that hold in every working directory."""
        return replace(found, model=_absolute(self.model), adapter=_absolute(self.adapter or ""))


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _show(report: IndexReport, out: Path, console: Console) -> None:
    seconds = report.seconds.get("prefill", 0.0)
    rate = f" at {report.num_tokens / seconds:,.0f} tokens/s" if report.num_tokens and seconds else ""
    facts = {
        "documents": f"{report.num_new_documents:,} new, {report.num_changed_documents:,} changed, "
        f"{report.num_unchanged_documents:,} unchanged, {report.num_gone_documents:,} gone, "
        f"{report.num_failed_documents:,} unreadable",
        "passages": f"{report.num_added_passages:,} added, {report.num_removed_passages:,} removed, "
        f"{report.num_shared_passages:,} in several documents",
        "blocks": f"{report.num_encoded_blocks:,} encoded, {report.num_skipped_blocks:,} stored before, "
        f"{report.num_dropped_blocks:,} dropped, {report.num_pending_blocks:,} left",
        "prefilled": f"{format_count(report.num_tokens, 'token')}, {format_bytes(report.num_bytes)}{rate}",
        "time": ", ".join(f"{stage} {format_seconds(spent)}" for stage, spent in report.seconds.items()),
    }
    console.print(facts_table(f"would be done in {out}" if report.is_dry_run else f"index {out}", facts))
    show_failures(report.failures, console, "could not be done")
    if not report.is_dry_run:
        print_note(f'ask it: rag-blockcache ask {out} "..."')
