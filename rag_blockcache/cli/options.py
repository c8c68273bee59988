"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from rag_blockcache.cli.parsing import parse_size

IndexDirectory: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory of the index, as given to index-and-prefill --out.")
]
Documents: TypeAlias = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH...", help="Files and folders: .txt, .md, .html, .pdf, and .jsonl of ready passages."
    ),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts; sizes in bytes.")
]
Model: TypeAlias = Annotated[
    str | None, typer.Option(help="Hub id or folder of the model, if it has moved since it was indexed with.")
]
Embedder: TypeAlias = Annotated[
    str | None, typer.Option(help="Hub id or folder of the embedder, if it has moved likewise.")
]
Adapter: TypeAlias = Annotated[
    str | None, typer.Option(help="Hub id or folder of a PEFT adapter to load into the model.")
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="Where models run: cpu, cuda, cuda:1. A GPU if there is one, if left out.")
]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="What the model computes in: bfloat16, float16, float32. That of its files if left out."
    ),
]
PassageFormat: TypeAlias = Annotated[
    str | None,
    typer.Option(help="How passages are shown to the model: paper, plain or template. paper if left out."),
]
Codec: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="none|int8|int4",
        help="How blocks are kept: none (exactly), int8 (half of the bytes) or int4 (less than a third, for "
        "some accuracy). none if left out.",
    ),
]
BlocksSee: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="themselves|preamble|stand-ins",
        help="What a block attends to beside itself. If left out: nothing, for a block-fine-tuned model, and "
        "for any other short stand-ins for other passages. An index knows its own.",
    ),
]
MaxPassageTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(min=8, help="Longest passage to cut documents into, in tokens of the model; usually 256."),
]
Overlap: TypeAlias = Annotated[
    int | None,
    typer.Option(min=0, help="Most tokens that a passage repeats of the one before it; usually 0."),
]
DiskBudget: TypeAlias = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Most that blocks may take on disk (20GB, 500MiB). Questions evict the least valuable.",
    ),
]
