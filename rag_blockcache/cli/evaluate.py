"""``eval``: what reuse costs in answers, measured against full attention on the same token ids."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_blockcache.cli.options import AsJson
from rag_blockcache.cli.output import print_json, print_note, stderr, stdout
from rag_blockcache.cli.progress import ProgressBar
from rag_blockcache.cli.units import format_count, format_value
from rag_blockcache.evaluation.answer_options import EvaluationOptions
from rag_blockcache.jobs.progress import JobProgress

# What fits a terminal, with its headings; the report has the rest.
_SHOWN = {
    "arm": "policy",
    "fidelity": "fidelity",
    "fidelity_interval": "95 %",
    "agreement": "same\ntoken",
    "accuracy": "accuracy",
    "gold_perplexity": "perpl.\nof gold",
    "recomputed": "computed\nagain",
    "ttft_seconds": "first\ntoken",
}


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an evaluation, in front of its own."""
    types, own = get_type_hints(EvaluationOptions), inspect.signature(command, eval_str=True).parameters
    parameters = [each for each in own.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    for each in reversed(dataclasses.fields(EvaluationOptions)):
        default = ... if each.default is dataclasses.MISSING else each.default
        option = typer.Option(default, f"--{each.name.replace('_', '-')}", **each.metadata)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.insert(
            0, inspect.Parameter(each.name, keyword, default=option, annotation=types[each.name])
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


@_with_options
def evaluate(*, as_json: AsJson = False, **given: Any) -> None:
    """Measure what reuse costs in answers: fidelity, accuracy and time to first token of each policy.

    Fidelity compares the next-token distributions along full attention's own answers, so it needs no gold
    answers: try it on questions and passages of your own.
    """
    from rag_blockcache.evaluation.answer_evaluation import evaluate as run
    from rag_blockcache.evaluation.answer_page import write_report
    from rag_blockcache.evaluation.command import typed_command

    options = EvaluationOptions(**given)
    with _resumable(options.report), ProgressBar(stderr()) as bar:
        found = run(options, lambda done, total, seconds: bar(_progress(done, total, seconds)))
    result = {"command": typed_command(), **found.to_json()}
    if options.report is not None:
        print_note(f"report: {write_report(found, typed_command(), Path(options.report))}")
    if as_json:
        print_json(result)
        return
    _show(result, stdout())
    if found.num_skipped:
        print_note(f"{format_count(found.num_skipped, 'prompt')} exceed the context window and were left out")
    if found.text is not None:
        print_note(f"perplexity of the text: {found.text.perplexity:.3f}")


@contextmanager
def _resumable(report: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if report is not None:
            print_note(f"what was measured is kept in {report}, and the same command goes on from there")
        raise


def _progress(num_done: int, num_total: int, seconds: float) -> JobProgress:
    return JobProgress("evaluate", num_done, num_total, seconds=seconds)


def _show(result: dict[str, Any], console: Console) -> None:
    """Draw a table for each benchmark, and each variant of it."""
    rows = result["rows"]
    told = {key for row in rows for key in row if row[key] is not None}
    kept = {key: name for key, name in _SHOWN.items() if key in told}
    for asked in dict.fromkeys((row["dataset"], row["variant"]) for row in rows):
        alike = [row for row in rows if (row["dataset"], row["variant"]) == asked]
        title = ", ".join([*filter(None, asked), format_count(alike[0]["num_questions"], "question")])
        console.print(Text(f"\n{title}"))
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for key, name in kept.items():
            table.add_column(name, justify="right", overflow="fold", no_wrap=key != "arm")
        for row in alike:
            table.add_row(*(Text(format_value(key, row[key])) for key in kept))
        console.print(table)
