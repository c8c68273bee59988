"""Write the tables of measured numbers into the documentation, from the result files beside it.

A page asks for the table of ``docs/benchmarks/NAME.json`` with a pair of comments:

    <!-- generated: NAME -->
    <!-- end generated -->

What stands between them is replaced. Keys after the name pick columns. A result file is one JSON
object with ``command`` (what measured it), ``hardware`` and ``versions`` (objects of strings),
``rows`` (objects with the same keys) and, where the keys are not the best headings, ``columns`` (key
to heading, which also picks and orders). A key that ends in ``_seconds`` or ``_bytes`` is shown in a
fitting unit. A result with ``plot`` (``x``: key of the horizontal axis, ``y``: keys to labels,
``y_label``) is drawn as ``NAME.svg`` beside it, both axes logarithmic; a page asks for it by that
name. What ``rag-blockcache eval`` measured is drawn as its report draws it: ``NAME.PLOT.svg``.

``--check`` writes nothing and fails when a page is not what the result files give.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_blockcache.cli.units import format_value
from rag_blockcache.evaluation.answer_plots import plots
from rag_blockcache.evaluation.answer_summary import AnswerReport

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/index.md", "docs/benchmarks.md", "docs/what-reuse-costs.md")

_SLOT = re.compile(r"(<!-- generated: ([\w.-]+)((?: \w+)*) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Bring every page up to date, or with ``--check`` say which ones are not."""
    if set(arguments) - {"--check"}:
        print(f"unknown argument in {arguments}; the only one is --check", file=sys.stderr)
        return 2
    stale, asked = [], set()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        asked |= {slot[2] for slot in _SLOT.finditer(text)}
        fresh = filled_in(text, ROOT / "docs" / "benchmarks", path.parent)
        if fresh != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    if "--check" not in arguments:
        for result in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
            measured = json.loads(result.read_text(encoding="utf-8"))
            plot(measured, result.with_suffix(".svg"))
            plot_answers(measured, result, asked)
    if "--check" in arguments and stale:
        print(
            f"{', '.join(stale)}: tables differ from docs/benchmarks/*.json; run `make docs`", file=sys.stderr
        )
        return 1
    return 0


def filled_in(text: str, results: Path, folder: Path) -> str:
    """Return the text of a page in ``folder``, its tables and links to plots made anew from ``results``."""

    def fill(slot: re.Match[str]) -> str:
        path = results / f"{slot[2].split('.')[0]}.json"
        if not path.is_file():
            return f"{slot[1]}Not measured yet; `make bench` does.\n{slot[5]}"
        if slot[2].endswith(".svg"):
            image = (results / slot[2]).relative_to(folder).as_posix()
            words = re.sub(r"[.-]", " ", slot[2].removesuffix(".svg"))
            return f"{slot[1]}![{words}]({image})\n{slot[5]}"
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{slot[1]}{table(result, slot[3].split())}{slot[5]}"

    return _SLOT.sub(fill, text)


def table(result: dict[str, Any], keys: Sequence[str] = ()) -> str:
    """Draw one result as a Markdown table, and below it what was measured where, by which command.

    Args:
        result: What a benchmark measured.
        keys: Columns to show; empty for all.
    """
    rows = result["rows"]
    columns = result.get("columns") or {key: heading(key) for key in rows[0]}
    columns = {key: columns[key] for key in keys or columns}
    lines = [list(columns.values()), ["---:"] * len(columns)]
    lines += [[format_value(key, row[key]) for key in columns] for row in rows]
    drawn = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    where = ", ".join(str(part) for part in result["hardware"].values())
    what = "".join(f"{result[key]}, " for key in ("model", "dtype") if key in result)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{drawn}\n{what}`{result['command']}` on {where}; {versions}.\n"


def heading(key: str) -> str:
    """Turn a key into words: the unit, if it ends in one, is shown with each number."""
    return re.sub(r"_(seconds|bytes)$", "", key).replace("_", " ")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw what a result says is to be drawn, the same bytes for the same numbers."""
    if "plot" not in result:
        return
    import matplotlib  # for whoever makes the plots; checking the tables goes without

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "rag_blockcache", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
        x, rows = result["plot"]["x"], result["rows"]
        for marker, (key, label) in zip("os^vDPX*", result["plot"]["y"].items(), strict=False):
            axes.loglog([row[x] for row in rows], [row[key] for row in rows], marker=marker, label=label)
        axes.set_xticks([row[x] for row in rows], [f"{row[x]:,}" for row in rows])
        axes.minorticks_off()
        axes.set_xlabel(result["columns"][x])
        axes.set_ylabel(result["plot"]["y_label"])
        axes.set_title(
            f"{result['model']}, {result['dtype']}, {', '.join(result['hardware'].values())}", fontsize=9
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def plot_answers(result: dict[str, Any], path: Path, asked: set[str]) -> None:
    """Draw what an evaluation of answers found, as its report does, where a page asks for it."""
    if "arms" not in result:
        return
    names = {field.name for field in dataclasses.fields(AnswerReport)} - {"environment"}
    report = AnswerReport(environment=None, **{name: result[name] for name in names})
    for name, drawn in plots(report).items():
        if f"{path.stem}.{name}.svg" in asked:
            path.with_suffix(f".{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
