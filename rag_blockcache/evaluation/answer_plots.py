"""Plots of an evaluation of answers, as SVG: the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from rag_blockcache.errors import MissingDependencyError
from rag_blockcache.evaluation.answer_summary import AVERAGE, AnswerReport

_MARKERS = "os^vDPX*<>"
_MOST_TICKS = 12
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
            rows = [row for row in _headline(report) if _has(row, x, y)]
            if len(rows) > 1:
                drawn[f"{y}-by-{x}"] = _frontier(rows, x, y)
    for x, slices in (("gold_position", report.by_gold_position), ("num_passages", report.by_num_passages)):
        for y in ("accuracy", "fidelity"):
            rows = [row for row in slices if _has(row, x, y)]
            for number, (variant, part) in enumerate(_series(rows, ("variant",)), start=1):
                name = f"{y}-by-{x}" if number == 1 else f"{y}-by-{x}-{number}"
                drawn[name] = _lines(part, x, y, variant)
    return drawn


def _has(row: _Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _headline(report: AnswerReport) -> list[_Row]:
    """Return the rows that speak for all: averages where there are several benchmarks."""
    averages = [row for row in report.rows if row["dataset"] == AVERAGE]
    return averages or list(report.rows)


def _series(rows: Sequence[_Row], by: Sequence[str]) -> Iterator[tuple[str, list[_Row]]]:
    """Part rows by the values of some fields, in the order in which they come."""
    parts: dict[str, list[_Row]] = {}
    for row in rows:
        label = ", ".join(str(row[name]) for name in by if row.get(name))
        parts.setdefault(label, []).append(row)
    yield from parts.items()


def _frontier(rows: Sequence[_Row], x: str, y: str) -> str:
    """Draw each arm as a point: with its name beside it, or where it is there several times, by colour."""
    figure, axes = _figure()
    series = list(_series(rows, ("dataset", "variant")))
    arms = dict.fromkeys(row["arm"] for row in rows)
    colours = {arm: f"C{number % 10}" for number, arm in enumerate(arms)}
    for (label, part), marker in zip(series, cycle(_MARKERS), strict=False):
        for row in part:
            colour = colours[row["arm"]] if len(series) > 1 else "C0"
            _errorbar(axes, [row], x, y, marker=marker, color=colour, linestyle="none")
        if len(series) > 1:
            axes.plot([], [], marker=marker, color="0.4", linestyle="none", label=label)
    if len(series) == 1:
        axes.set_title(series[0][0], fontsize=9)
        _write_names(axes, rows, x, y)
    else:
        for arm, colour in colours.items():
            axes.plot([], [], marker="s", color=colour, linestyle="none", label=arm)
    return _finished(figure, axes, x, y)


def _write_names(axes: Any, rows: Sequence[_Row], x: str, y: str) -> None:
    """Write the name of each arm beside its point, on the side where there is room."""
    middle = (min(row[x] for row in rows) + max(row[x] for row in rows)) / 2
    for row in rows:
        is_left = row[x] <= middle
        axes.annotate(
            row["arm"],
            (row[x], row[y]),
            xytext=(5 if is_left else -5, 4),
            textcoords="offset points",
            horizontalalignment="left" if is_left else "right",
            fontsize=7,
        )


def _lines(rows: Sequence[_Row], x: str, y: str, variant: str) -> str:
    """Draw each arm as a line, a little aside from the others, so that intervals can be told apart."""
    figure, axes = _figure()
    axes.set_title(variant, fontsize=9)
    values = sorted({row[x] for row in rows})
    step = 0.006 * (values[-1] - values[0])
    series = list(_series(rows, ("arm",)))
    for number, (label, part) in enumerate(series):
        moved = [{**row, x: row[x] + step * (number - (len(series) - 1) / 2)} for row in part]
        _errorbar(axes, moved, x, y, marker=_MARKERS[number % len(_MARKERS)], label=label)
    if len(values) <= _MOST_TICKS:
        axes.set_xticks(values, [str(value) for value in values])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes, x, y)


def _figure() -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")


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
    if axes.get_legend_handles_labels()[1]:
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)  # where it covers nothing
    drawn = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": "rag_blockcache", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return drawn.getvalue()
