"""``bench``: what this model does on this machine. Progress on stderr, the result on stdout."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.options import AsJson, Device, Dtype
from rag_blockcache.cli.output import print_json, print_note, stdout, to_json
from rag_blockcache.cli.parsing import parse_lengths
from rag_blockcache.cli.units import format_value

bench = typer.Typer(
    name="bench",
    help="Measure a model on this machine: time to first token, prefill throughput, peak memory.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Model: TypeAlias = Annotated[str | None, typer.Option(help="Hub id or folder of the model.")]
Shape: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="A random model instead, with nothing to download: "
        "llama-3-8b, llama-3.2-1b, qwen3-0.6b or smollm2-135m."
    ),
]
TextFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text to cut passages from. Random tokens if left out."),
]
Directory: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Disk to measure. That of temporary files if left out."),
]
Output: TypeAlias = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the JSON result here as well.")
]


@bench.command()
def latency(
    model: Model = None,
    shape: Shape = None,
    lengths: Annotated[
        Any, typer.Option(parser=parse_lengths, metavar="N,N,...", help="Prompt lengths, in tokens.")
    ] = "512,1024,2048,4096,8000",
    final_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the passages.")] = 50,
    passage_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a passage, about.")] = 100,
    policies: Annotated[str, typer.Option(help="Reuse policies, the compared one first.")] = (
        "block,link-16+query-0.08"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at each length, after one to warm up.")] = 5,
    cuda_graphs: Annotated[
        bool, typer.Option(help="On a GPU, run short passes as graphs, with kernels of our own.")
    ] = True,
    text: TextFile = None,
    directory: Directory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time the first token by prompt length: full prefill, reuse from memory and disk, and the floor.

    All take turns over the same token ids. The floor is the final block over an assembled context.

    \b
    Example:
      rag-blockcache bench latency --model MODEL --lengths 512,2048,8000 --json
    """  # noqa: D301 - the backspace keeps lines of an example apart
    from rag_blockcache.evaluation.latency import measure_latency
    from rag_blockcache.evaluation.shapes import open_model

    opened = open_model(model, shape, device=device, dtype=dtype)
    opened.cuda_graphs = cuda_graphs and opened.device.type == "cuda"
    report = measure_latency(
        opened,
        lengths=lengths,
        final_tokens=final_tokens,
        passage_tokens=passage_tokens,
        repeats=repeats,
        policies=[policy.strip() for policy in policies.split(",")],
        text=_read(text),
        name=model or shape,
        directory=directory,
        progress=print_note,
    )
    _show("time to first token", report.to_json(), out, as_json)


@bench.command()
def prefill(
    model: Model = None,
    shape: Shape = None,
    num_tokens: Annotated[int, typer.Option("--tokens", min=100, help="Tokens in each round.")] = 20000,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens of the shortest passage.")] = 60,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest passage.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 3,
    text: TextFile = None,
    directory: Directory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time the encoding of passages, with and without a disk, against the bare model's batched forward.

    \b
    Example:
      rag-blockcache bench prefill --model MODEL --tokens 20000 --json
    """  # noqa: D301
    from rag_blockcache.evaluation.prefill import measure_prefill
    from rag_blockcache.evaluation.shapes import open_model

    measure = measure_prefill(
        open_model(model, shape, device=device, dtype=dtype),
        num_tokens=num_tokens,
        passage_tokens=(shortest, longest),
        repeats=repeats,
        text=_read(text),
        name=model or shape,
        directory=directory,
        progress=print_note,
    )
    _show("prefill", measure.to_json(), out, as_json)


@bench.command()
def memory(
    model: Model = None,
    shape: Shape = None,
    num_tokens: Annotated[int, typer.Option("--tokens", min=100, help="Length of the prompt.")] = 8000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    directory: Directory = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Output = None,
    as_json: AsJson = False,
) -> None:
    """Tell the peak memory of one answer from blocks on disk, in a process of its own.

    Counted are all pages resident in the process, mapped files too.

    \b
    Example:
      rag-blockcache bench memory --model MODEL --tokens 8000 --json
    """  # noqa: D301
    from rag_blockcache.evaluation.memory import measure_memory

    measure = measure_memory(
        model,
        shape=shape,
        num_tokens=num_tokens,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        directory=directory,
    )
    _show("peak memory", measure.to_json(), out, as_json)


def _read(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8")


def _show(title: str, result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    result = {"command": _command(), **to_json(result)}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
        return
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for heading in result["columns"].values():
        table.add_column(heading, justify="right", overflow="fold")
    for row in result["rows"]:
        table.add_row(*(Text(format_value(key, row[key])) for key in result["columns"]))
    stdout().print(table)
    for note in result.get("notes", []):
        print_note(note)


def _command() -> str:
    """Return what was typed, without folders of this machine."""
    program, *arguments = sys.argv
    script, folder = Path(program), Path.cwd()
    words = [script.name]
    if script.suffix == ".py":
        words = ["python", str(script.relative_to(folder) if script.is_relative_to(folder) else script)]
    return shlex.join([*words, *map(_shortened, arguments)])


def _shortened(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
