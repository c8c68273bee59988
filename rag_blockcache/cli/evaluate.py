"""``eval``: what reuse costs in answers, measured against full attention on the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.options import Adapter, AsJson, Device, Dtype
from rag_blockcache.cli.output import print_json, print_note, stderr, stdout
from rag_blockcache.cli.parsing import parse_lengths
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_count, format_value
from rag_blockcache.jobs.progress import JobProgress

# What fits a terminal; the report has the rest.
_SHOWN = ["dataset", "variant", "arm", "fidelity", "fidelity_interval", "agreement", "accuracy", "recomputed"]
_SHOWN += ["ttft_seconds"]


def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Benchmark; may be given several times. A file of questions, answers and passages, "
            "hf:nq, hf:triviaqa, hf:hotpotqa, hf:2wiki, or hf:owner/name:split.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Hub id or folder of the model.")],
    policies: Annotated[
        str,
        typer.Option(
            help="Reuse policies. Behind each may stand /conditioned (blocks see the preamble) or /unmoved "
            "(no position re-encoding). full and no-passages are measured in any case."
        ),
    ] = "block,link-16,link-16+query-0.08",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark.")] = None,
    num_passages: Annotated[
        Any,
        typer.Option(parser=parse_lengths, metavar="N,N,...", help="Ask with these numbers of passages."),
    ] = None,
    orders: Annotated[
        str,
        typer.Option(
            help="Ask with passages in these orders: given, reversed, shuffled, gold-first, gold-last, twice."
        ),
    ] = "given",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions at a time.")] = None,
    timed: Annotated[
        int, typer.Option(min=0, help="Questions that are asked alone too, to time the first token.")
    ] = 20,
    score_gold: Annotated[
        bool, typer.Option("--score-gold", help="Measure the perplexity of gold answers too.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure the perplexity of this text under full attention too."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep predictions and a report here; a run that was stopped goes on from them.",
        ),
    ] = None,
    adapter: Adapter = None,
    passage_format: Annotated[
        str, typer.Option(help="How passages are shown: paper, plain, verbatim or template.")
    ] = "paper",
    preamble: Annotated[
        str | None, typer.Option(help="Text before the passages, instead of that of the format.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure what reuse costs in answers: fidelity, accuracy and time to first token of each policy.

    Fidelity compares the next-token distributions along full attention's own answers, so it needs no gold
    answers: try it on questions and passages of your own.
    """
    from rag_blockcache.evaluation.answer_evaluation import EvaluationOptions
    from rag_blockcache.evaluation.answer_evaluation import evaluate as run
    from rag_blockcache.evaluation.answer_page import write_report
    from rag_blockcache.evaluation.command import typed_command

    options = EvaluationOptions(
        data=data,
        model=model,
        policies=policies,
        limit=limit,
        num_passages=list(num_passages or ()),
        orders=[order.strip() for order in orders.split(",")],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        timed=timed,
        score_gold=score_gold,
        text=None if text is None else str(text),
        report=None if report is None else str(report),
        adapter=adapter,
        passage_format=passage_format,
        preamble=preamble,
        device=device,
        dtype=dtype,
    )
    with ProgressBar(stderr()) as bar:
        found = run(options, lambda done, total, seconds: bar(_progress(done, total, seconds)))
    result = {"command": typed_command(), **found.to_json()}
    if report is not None:
        print_note(f"report: {write_report(found, typed_command(), report)}")
    if as_json:
        print_json(result)
        return
    stdout().print(_table(result))
    if found.num_skipped:
        print_note(f"{format_count(found.num_skipped, 'prompt')} exceed the context window and were left out")
    if found.text is not None:
        print_note(f"perplexity of the text: {found.text.perplexity:.3f}")


def _progress(num_done: int, num_total: int, seconds: float) -> JobProgress:
    return JobProgress("evaluate", num_done, num_total, seconds=seconds)


def _table(result: dict[str, Any]) -> Table:
    headings = {key: name for key, name in result["columns"].items() if key in _SHOWN}
    told = {key for row in result["rows"] for key, value in row.items() if value not in (None, "")}
    kept = {key: name for key, name in headings.items() if key in told}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in kept.values():
        table.add_column(name, justify="right", overflow="fold")
    for row in result["rows"]:
        table.add_row(*(Text(format_value(key, row[key])) for key in kept))
    return table
