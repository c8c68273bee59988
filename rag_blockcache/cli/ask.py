"""``ask``: answers from an index, with their sources and how soon the first token came."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.opening import open_index
from rag_blockcache.cli.options import AsJson, Device, DiskBudget, Embedder, IndexDirectory, Model
from rag_blockcache.cli.output import print_error, print_json, print_note, printable, stdout
from rag_blockcache.cli.units import format_count, format_seconds
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.reuse import parse_policy

if TYPE_CHECKING:
    from rag_blockcache.answers import Answer
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.passages import Passage
    from rag_blockcache.retriever import Retriever, SearchResult

_SHOWN_CHARACTERS = 160  # of a source passage


def ask(
    directory: IndexDirectory,
    question: Annotated[
        str | None,
        typer.Argument(help="What to ask. Left out: a prompt on a terminal, else the text on stdin."),
    ] = None,
    num_passages: Annotated[
        int, typer.Option("--passages", "-k", min=1, help="How many passages to answer from.")
    ] = 5,
    policy: Annotated[
        str,
        typer.Option(
            help="How blocks are reused: block (as stored), link-N (first N tokens of each computed again), "
            "full (no reuse, exact), or auto."
        ),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this share.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from this many likeliest tokens.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes drawn tokens repeatable, under one policy.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")
    ] = None,
    model: Model = None,
    embedder: Embedder = None,
    device: Device = None,
    disk_budget: DiskBudget = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from an index.

    Retrieves passages, places their stored blocks, computes the question, and streams the answer. Shows
    where it came from (sources with their similarity, at most 1), when the first token came, and how much was
    reused. Without a question it prompts for one after the other; an empty line ends it.
    """
    if policy != "auto":
        parse_policy(policy)  # a mistake shows now, not after the model was loaded
    asked = None if question is None and _is_prompting(as_json) else _one_question(question)
    sampling = _sampling(temperature, top_p, top_k, seed, stop)
    with open_index(directory, model=model, device=device, disk_budget_bytes=disk_budget) as (
        cache,
        retriever,
    ):
        options = {"policy": policy, "max_new_tokens": max_new_tokens, **sampling}
        asking = Asking(cache, retriever, num_passages, options, seed)
        if as_json:
            print_json(asking.as_json(asked or ""))
        elif asked is not None:
            asking.show(asked, stdout())
        else:
            _prompt(asking, stdout())


def _is_prompting(as_json: bool) -> bool:
    return sys.stdin.isatty() and not as_json


def _one_question(question: str | None) -> str:
    text = sys.stdin.read() if question is None and not sys.stdin.isatty() else question or ""
    if not text.strip():
        raise InvalidInputError("the question is empty; write it behind the directory, in quotes")
    return text.strip()


def _sampling(
    temperature: float, top_p: float | None, top_k: int | None, seed: int | None, stop: list[str] | None
) -> dict[str, Any]:
    """Translate to options of transformers' ``generate()``."""
    if temperature == 0 and (top_p is not None or top_k is not None or seed is not None):
        raise InvalidInputError("--top-p, --top-k and --seed draw tokens; give --temperature above 0 too")
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    options = {"do_sample": temperature > 0, "stop_strings": stop, **drawn}
    return {name: value for name, value in options.items() if value is not None}


class Asking:
    """Asks one index, in one way, as often as wanted."""

    def __init__(
        self,
        cache: BlockCache,
        retriever: Retriever,
        num_passages: int,
        options: dict[str, Any],
        seed: int | None,
    ) -> None:
        self._cache, self._retriever = cache, retriever
        self._num_passages, self._options, self._seed = num_passages, options, seed

    def as_json(self, question: str) -> dict[str, Any]:
        """Answer, and return all that is known of the answer."""
        sources = self._prepare(question)
        answer = self._cache.generate(question, _in_prompt_order(sources), **self._options)
        passages = [{"score": found.score, **asdict(found.passage)} for found in sources]
        return {"question": question, **asdict(answer), "passages": passages}

    def show(self, question: str, console: Console) -> None:
        """Show the sources, the answer as it comes, and what it took."""
        sources = self._prepare(question)
        console.print(sources_table(sources), end="\n\n")
        stream = self._cache.stream(question, _in_prompt_order(sources), **self._options)
        try:
            for piece in stream:
                typer.echo(printable(piece), nl=False)
        finally:
            stream.close()
            typer.echo()
        if stream.answer is not None:
            console.print(Text(f"\n{describe_answer(stream.answer)}", style="dim"), soft_wrap=True)

    def _prepare(self, question: str) -> list[SearchResult]:
        """Retrieve, and have the same tokens drawn whatever was asked before."""
        if self._seed is not None:
            import torch

            torch.manual_seed(self._seed)
        return self._retriever.search(question, self._num_passages)


def _in_prompt_order(sources: list[SearchResult]) -> list[Any]:
    """Put the most relevant passage last, next to the question."""
    return [found.passage for found in reversed(sources)]


def _prompt(asking: Asking, console: Console) -> None:
    """Ask for questions until there are no more; one that fails does not end it."""
    for question in _questions():
        try:
            asking.show(question, console)
        except InvalidInputError as error:
            print_error(str(error))
        except KeyboardInterrupt:
            print_note("stopped; ask on, or end with an empty line")


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("\nquestion> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def sources_table(sources: list[SearchResult]) -> Table:
    """Show what was retrieved, the most similar first."""
    table = Table(box=None, pad_edge=False, title="sources", title_justify="left", show_header=False)
    table.add_column(justify="right", style="dim")
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    for number, found in enumerate(sources, start=1):
        text = " ".join(printable(found.passage.text).split())
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
        title = f"{printable(found.passage.title)}: " if found.passage.title else ""
        origin = (f" ({_origin(found.passage)})" if found.passage.metadata.get("source") else "", "dim")
        table.add_row(str(number), f"{found.score:.2f}", Text.assemble((title, "bold"), shown, origin))
    return table


def _origin(passage: Passage) -> str:
    """Name the file that a passage came from, and the page."""
    page = passage.metadata.get("page")
    return printable(Path(str(passage.metadata["source"])).name) + (f", page {page}" if page else "")


def describe_answer(answer: Answer) -> str:
    """Say when the first token came, what it waited for, and how much was reused."""
    parts = {
        "match": answer.match_seconds,
        "load": answer.load_seconds,
        "encode": answer.encode_seconds,
        "assemble": answer.assemble_seconds,
        "final block": answer.final_block_seconds,
    }
    took = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts.items())
    num_passages = answer.num_hits + answer.num_misses
    found = (
        f"{answer.num_hits} of {format_count(num_passages, 'passage')} found prefilled; "
        if num_passages
        else ""
    )
    reason = f" ({answer.policy_reason})" if answer.policy_reason else ""
    return (
        f"first token after {format_seconds(answer.ttft_seconds)} ({took})\n"
        f"{found}{format_count(answer.num_reused_tokens, 'token')} reused, "
        f"{answer.num_computed_tokens:,} computed\n"
        f"{answer.decode_tokens_per_second:.1f} tokens/s; policy {answer.policy}{reason}"
    )
