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
from rag_blockcache.evaluation.answer_summary import AnswerReport

logger = logging.getLogger(__name__)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
"""
_TEXT = """
<p>Every policy answers the same questions from the same token ids. <b>Accuracy</b>: a gold answer is
contained in the output, both after SQuAD normalisation. <b>Fidelity</b>: 1 less KL(full, policy) over
KL(full, no passages), each summed over the tokens of full attention's own greedy answer; 1 is full attention,
0 is what the model says without any passage. <b>Same token</b>: share of these tokens at which both find the
same token likeliest. <b>Computed again</b>: share of passage tokens that the prefill pass computes.
<b>First token</b>: median seconds of questions asked alone, blocks in memory.</p>
<p>Intervals hold 95 % of 2,000 paired bootstrap resamples of the questions. A difference whose interval holds
zero is not one that these questions show. Where all of a few questions came out alike, no resample shows how
unsure that is: mind their number.</p>
"""
_SLICES = {
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
<title>What reuse costs in answers</title>
<style>{style}</style>
{body}
</html>
"""
_DIFFERENCES = {"measure": "measure", "arm": "policy", "than": "than", "value": "more by", "interval": "95 %"}


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
    columns = report.to_json()["columns"]
    parts = [f"<h1>{_escaped(report.environment.model)}: what reuse costs in answers</h1>", _TEXT]
    parts.append(f"<p>{_escaped(_where(report))}<br><code>{_escaped(command)}</code></p>")
    for dataset, variant in dict.fromkeys((row["dataset"], row["variant"]) for row in report.rows):
        title = ", ".join(filter(None, (dataset, variant)))
        rows = [row for row in report.rows if (row["dataset"], row["variant"]) == (dataset, variant)]
        shown = {key: name for key, name in columns.items() if key not in ("dataset", "variant")}
        parts += [f"<h2>{_escaped(title)}</h2>", _table(rows, shown)]
        clear = [
            {**each, "interval": f"{each['low']:.3f} to {each['high']:.3f}"}
            for each in report.comparisons
            if (each["dataset"], each["variant"]) == (dataset, variant) and each["is_clear"]
        ]
        parts.append(_folded(f"{len(clear)} differences that these questions show", clear, _DIFFERENCES))
    for sliced, what in ((report.by_gold_position, "place of gold"), (report.by_num_passages, "passages")):
        parts.append(_folded(f"By {what}", sliced, _SLICES) if sliced else "")
    parts += [f"<figure>{svg[svg.index('<svg') :]}</figure>" for svg in drawn.values()]
    return _PAGE.format(style=_STYLE, body="\n".join(parts))


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
    kept = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    head = "".join(f"<th>{_escaped(name)}</th>" for name in kept.values())
    lines = ["".join(f"<td>{_escaped(_written(row.get(key)))}</td>" for key in kept) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _folded(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    table = _table(rows, columns) if rows else ""
    return f"<details><summary>{_escaped(title)}</summary>{table}</details>"


def _written(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return html.escape(text)
