"""Plots of an evaluation of answers, as SVG: the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rag_blockcache.errors import MissingDependencyError
from rag_blockcache.evaluation.answer_summary import AVERAGE, AnswerReport

_MARKERS = "os^vDPX*<>"
_LABELS = {
    "accuracy": "accuracy (gold answer contained)",
    "fidelity": "fidelity to full attention",
    "recomputed": "share of passage tokens computed again",
    "ttft_seconds": "time to first token, seconds",
    "gold_position": "place of the first gold passage",
    "num_passages": "passages in the prompt",
}
_Row = Mapping[str, Any]


def plots(report: AnswerReport) -> dict[str, str]:
    """Draw what the numbers of a report allow.

    Returns:
        Text of an SVG by name.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed; run: pip install 'rag_blockcache[plots]'"
        ) from error
    matplotlib.use("svg")
    drawn = {}
    for x in ("recomputed", "ttft_seconds"):
        for y in ("fidelity", "accuracy"):
            rows = [row for row in _headline(report) if x in row and y in row]
            if len(rows) > 1:
                drawn[f"{y}-by-{x}"] = _frontier(rows, x, y)
    for x, slices in (("gold_position", report.by_gold_position), ("num_passages", report.by_num_passages)):
        for y in ("accuracy", "fidelity"):
            if any(y in row for row in slices):
                drawn[f"{y}-by-{x}"] = _lines(slices, x, y)
    return drawn


def _headline(report: AnswerReport) -> list[_Row]:
    """Return the rows that speak for all: averages where there are several benchmarks."""
    averages = [row for row in report.rows if row["dataset"] == AVERAGE]
    return averages or list(report.rows)


def _series(rows: Sequence[_Row], by: Sequence[str]) -> Iterator[tuple[str, list[_Row]]]:
    """Part rows by the values of some fields, in the order in which they come."""
    for values in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        yield (
            ", ".join(str(value) for value in values if value),
            [row for row in rows if tuple(row[name] for name in by) == values],
        )


def _frontier(rows: Sequence[_Row], x: str, y: str) -> str:
    """Draw each arm as a point with its interval and its name."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for marker, (label, part) in zip(_MARKERS, _series(rows, ("dataset", "variant")), strict=False):
        _errorbar(axes, part, x, y, marker=marker, label=label, linestyle="none")
        for row in part:
            place = (row[x], row[y])
            axes.annotate(row["arm"], place, xytext=(5, 4), textcoords="offset points", fontsize=7)
    return _finished(figure, axes, x, y)


def _lines(rows: Sequence[_Row], x: str, y: str) -> str:
    """Draw each arm as a line, a little aside from the others, so that intervals can be told apart."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for number, (label, part) in enumerate(_series([row for row in rows if y in row], ("arm",))):
        moved = [{**row, x: row[x] * (1 + 0.008 * number)} for row in part]
        _errorbar(axes, moved, x, y, marker=_MARKERS[number % len(_MARKERS)], label=label)
    values = sorted({row[x] for row in rows})
    axes.set_xticks(values, [str(value) for value in values])
    return _finished(figure, axes, x, y)


def _errorbar(axes: Any, rows: Sequence[_Row], x: str, y: str, **style: Any) -> None:
    spread = [
        [max(0.0, row[y] - row[f"{y}_low"]) for row in rows],
        [max(0.0, row[f"{y}_high"] - row[y]) for row in rows],
    ]
    axes.errorbar([row[x] for row in rows], [row[y] for row in rows], yerr=spread, capsize=2, **style)


def _finished(figure: Any, axes: Any, x: str, y: str) -> str:
    from matplotlib import pyplot

    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(f"{_LABELS[y]}, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")  # "best" takes long where there is much to look at
    drawn = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": "rag_blockcache", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return drawn.getvalue()
