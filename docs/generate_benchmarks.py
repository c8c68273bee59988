"""Write the tables of measured numbers into the documentation, from the result files beside it.

A page asks for the table of ``docs/benchmarks/NAME.json`` with a pair of comments:

    <!-- generated: NAME -->
    <!-- end generated -->

What stands between them is replaced. A result file is one JSON object with ``command`` (what
measured it), ``hardware`` and ``versions`` (objects of strings), ``rows`` (objects with the same
keys) and, where the keys are not the best headings, ``columns`` (key to heading, which also picks
and orders). A key that ends in ``_seconds`` or ``_bytes`` is shown in a fitting unit.

``--check`` writes nothing and fails when a page is not what the result files give.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rag_blockcache.cli.units import format_bytes, format_seconds

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/index.md", "docs/benchmarks.md")

_SLOT = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Bring every page up to date, or with ``--check`` say which ones are not."""
    if set(arguments) - {"--check"}:
        print(f"unknown argument in {arguments}; the only one is --check", file=sys.stderr)
        return 2
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        fresh = filled_in(text, ROOT / "docs" / "benchmarks")
        if fresh != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    if "--check" in arguments and stale:
        print(
            f"{', '.join(stale)}: tables differ from docs/benchmarks/*.json; run `make docs`", file=sys.stderr
        )
        return 1
    return 0


def filled_in(text: str, results: Path) -> str:
    """Return ``text`` with every table made anew from the result files in ``results``."""

    def fill(slot: re.Match[str]) -> str:
        path = results / f"{slot[2]}.json"
        if not path.is_file():
            return f"{slot[1]}Not measured yet; `make bench` does.\n{slot[4]}"
        return f"{slot[1]}{table(json.loads(path.read_text(encoding='utf-8')))}{slot[4]}"

    return _SLOT.sub(fill, text)


def table(result: dict[str, Any]) -> str:
    """Draw one result as a Markdown table, and below it what was measured where, by which command."""
    rows = result["rows"]
    columns = result.get("columns") or {key: heading(key) for key in rows[0]}
    lines = [list(columns.values()), ["---:"] * len(columns)]
    lines += [[shown(key, row[key]) for key in columns] for row in rows]
    drawn = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    where = ", ".join(str(part) for part in result["hardware"].values())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{drawn}\n`{result['command']}` on {where}; {versions}.\n"


def heading(key: str) -> str:
    """Turn a key into words: the unit, if it ends in one, is shown with each number."""
    return re.sub(r"_(seconds|bytes)$", "", key).replace("_", " ")


def shown(key: str, value: object) -> str:
    """Format a number by the unit in its name."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("_seconds"):
        return format_seconds(value)
    if key.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
