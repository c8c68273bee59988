"""The report of an evaluation of answers: one HTML page that needs nothing beside it, and its numbers."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_blockcache.errors import MissingDependencyError
from rag_blockcache.evaluation.answer_plots import plots
from rag_blockcache.evaluation.answer_summary import AVERAGE, AnswerReport

logger = logging.getLogger(__name__)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
code { overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
"""
_TEXT = """
<p>Every policy answers the same questions from the same token ids. <b>Accuracy</b>: a gold answer is
contained in the output, both after SQuAD normalisation. <b>Fidelity</b>: 1 less KL(full, policy) over
KL(full, no passages), each summed over the tokens of full attention's own greedy answer; 1 is full attention,
0 is what the model says without any passage. <b>Same token</b>: share of these tokens at which both find the
same token likeliest. <b>Computed again</b>: share of passage tokens that the prefill pass computes.
<b>First token</b>: median seconds of questions asked alone, blocks in memory.</p>
<p>Intervals hold 95 % of 2,000 paired bootstrap resamples of the questions. A difference is listed only if
its interval leaves zero out and it comes from six questions or more; all others are none that these questions
show. An average counts all benchmarks alike. Where all of a few questions came out alike, no resample shows
how unsure that is: mind their number.</p>
"""
_SLICES = {
    "variant": "prompts",
    "gold_position": "place of gold",
    "num_passages": "passages",
    "arm": "policy",
    "num_questions": "questions",
    "accuracy": "accuracy",
    "accuracy_interval": "95 %",
    "fidelity": "fidelity",
    "fidelity_interval": "95 %",
}
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What reuse costs in answers</title>
<style>{style}</style>
{body}
</html>
"""
_POOLED = "questions of all benchmarks and orders together"
_DIFFERENCES = {
    "measure": "measure",
    "arm": "policy",
    "than": "than",
    "value": "more by",
    "interval": "95 %",
    "num_differing": "questions that differ",
}


def write_report(report: AnswerReport, command: str, directory: Path | str) -> Path:
    """Write ``result.json`` and ``index.html`` into a directory.

    Args:
        report: What was found.
        command: What measured it, as it was typed.
        directory: Is made if it is not there.

    Returns:
        Path of the page; where matplotlib is not installed, it goes without plots, and the log says so.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"command": command, **report.to_json()}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path = folder / "index.html"
    try:
        drawn = plots(report)
    except MissingDependencyError as error:
        logger.warning("the report has no plots: %s", error)
        drawn = {}
    path.write_text(page(report, command, drawn), encoding="utf-8")
    return path


def page(report: AnswerReport, command: str, drawn: Mapping[str, str]) -> str:
    """Return the page as HTML, with plots by name."""
    asked = list(dict.fromkeys((row["dataset"], row["variant"]) for row in report.rows))
    averages = [each for each in asked if each[0] == AVERAGE]
    slices = {"place of gold": report.by_gold_position, "number of passages": report.by_num_passages}
    figures = [f"<figure>{svg[svg.index('<svg') :]}</figure>" for svg in drawn.values()]
    parts = [
        f"<h1>{_escaped(report.environment.model)}: what reuse costs in answers</h1>",
        _TEXT,
        f"<p>{_escaped(_where(report))}<br><code>{_escaped(command)}</code></p>",
        *(_benchmark(report, *each) for each in averages),
        f'<div class="plots">{"".join(figures)}</div>',
        *(_benchmark(report, *each) for each in asked if each not in averages),
        *(_folded(f"By {what}, {_POOLED}", rows, _SLICES) for what, rows in slices.items() if rows),
    ]
    return _PAGE.format(style=_STYLE, body="\n".join(parts))


def _benchmark(report: AnswerReport, dataset: str, variant: str) -> str:
    """Show all arms on one benchmark, or on average, and what can be said of their differences."""

    def of_it(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [row for row in rows if (row["dataset"], row["variant"]) == (dataset, variant)]

    columns = report.to_json()["columns"]
    shown = {key: name for key, name in columns.items() if key not in ("dataset", "variant")}
    clear = [
        {**each, "interval": f"{each['low']:.3f} to {each['high']:.3f}"}
        for each in of_it(report.comparisons)
        if each["is_clear"]
    ]
    title = ", ".join(filter(None, (dataset, variant)))
    folded = _folded(f"{len(clear)} differences that these questions show", clear, _DIFFERENCES)
    return f"<h2>{_escaped(title)}</h2>{_table(of_it(report.rows), shown)}{folded}"


def _where(report: AnswerReport) -> str:
    where = report.environment
    facts = [
        *where.hardware.values(),
        where.dtype,
        *(f"{name} {each}" for name, each in where.versions.items()),
    ]
    facts.append(f"answers of at most {report.max_new_tokens} tokens, passage format {report.passage_format}")
    if report.num_skipped:
        facts.append(f"{report.num_skipped} prompts left out, which exceed the context window")
    if report.text is not None:
        facts.append(
            f"perplexity of the given text {report.text.perplexity:.3f} ({report.text.num_tokens:,} tokens)"
        )
    return "; ".join([*facts, where.date])


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    kept = {key: name for key, name in columns.items() if any(row.get(key) not in (None, "") for row in rows)}
    head = "".join(f"<th>{_escaped(name)}</th>" for name in kept.values())
    lines = ["".join(f"<td>{_escaped(_written(key, row.get(key)))}</td>" for key in kept) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _folded(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    table = _table(rows, columns) if rows else ""
    return f"<details><summary>{_escaped(title)}</summary>{table}</details>"


def _written(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("_seconds"):
        return f"{value:.3g}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return html.escape(text)
