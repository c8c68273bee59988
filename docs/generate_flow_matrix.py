"""Write the tables of framework flows into the documentation, from what the tests measured.

A page asks for the table of ``docs/integrations/NAME.json`` with a pair of comments:

    <!-- flows: NAME -->
    <!-- end flows -->

What stands between them is replaced. The file is a list of objects with ``flow`` (a row), ``variant`` (a
column), ``num_passages`` (how often retrieved passages stood in the prompts) and ``num_reused`` (how many of
these were taken from the store). A test compares the file with what it measures.

``--check`` writes nothing and fails when a page is not what the files give.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "integrations"

_SLOT = re.compile(r"(<!-- flows: ([\w.-]+) -->\n)(.*?)(<!-- end flows -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Bring every page up to date, or with ``--check`` say which ones are not."""
    if set(arguments) - {"--check"}:
        print(f"unknown argument in {arguments}; the only one is --check", file=sys.stderr)
        return 2
    stale = []
    for page in sorted(FOLDER.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        fresh = filled_in(text)
        if fresh != text:
            stale.append(page.name)
            if "--check" not in arguments:
                page.write_text(fresh, encoding="utf-8")
    if "--check" in arguments and stale:
        print(
            f"{', '.join(stale)}: tables differ from docs/integrations/*.json; run "
            "`python docs/generate_flow_matrix.py`",
            file=sys.stderr,
        )
        return 1
    return 0


def filled_in(text: str) -> str:
    """Return the text of a page with its tables made anew."""

    def fill(slot: re.Match[str]) -> str:
        rows = json.loads((FOLDER / f"{slot[2]}.json").read_text(encoding="utf-8"))
        return f"{slot[1]}{table(rows)}{slot[4]}"

    return _SLOT.sub(fill, text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw measurements as a Markdown table: a line a flow, a column a variant, in order of appearance."""
    cells = {(row["flow"], row["variant"]): f"{row['num_reused']} of {row['num_passages']}" for row in rows}
    flows, variants = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [["flow", *variants], ["---", *["---:"] * len(variants)]]
    lines += [[flow, *(cells.get((flow, variant), "-") for variant in variants)] for flow in flows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
