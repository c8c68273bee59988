"""What was measured during training, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HISTORY_FILE, CURVES_FILE = "training.json", "training.svg"
_COLOURS = {"block": "tab:blue", "full": "tab:orange", "text": "tab:green"}
_PANELS = {
    "loss of a learned token": ("loss_{}", "eval_loss_{}"),
    "answers exact": ("eval_exact_{}",),
    "answers right": ("eval_accuracy_{}",),
}

History = Sequence[Mapping[str, float]]


def write_history(content: Mapping[str, Any], folder: Path) -> None:
    """Write what is known of a run; the file is there when the run is complete."""
    unfinished = folder / f"{HISTORY_FILE}.unfinished"
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / HISTORY_FILE)


def draw_curves(history: History, folder: Path) -> None:
    """Draw loss and exactness against steps, by kind: training dotted, held out drawn through."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = {title: names for title, names in _PANELS.items() if _has_any(history, names)}
    with pyplot.rc_context({"svg.hashsalt": "rag_blockcache", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(
            1, len(panels) or 1, figsize=(5 * len(panels) or 5, 3.5), squeeze=False
        )
        for axis, (title, names) in zip(axes[0], panels.items(), strict=False):
            for name in names:
                _draw(axis, history, name)
            axis.set(title=title, xlabel="steps")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(folder / CURVES_FILE, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def points(history: History, name: str) -> list[tuple[float, float]]:
    """Return step and value wherever something was logged by that name."""
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def _draw(axis: Any, history: History, name: str) -> None:
    for mode, colour in _COLOURS.items():
        found = points(history, name.format(mode))
        if found:
            held_out = name.startswith("eval_")
            label = f"{mode}, held out" if held_out else f"{mode}, training"
            axis.plot(*zip(*found, strict=True), label=label, color=colour, ls="-" if held_out else ":")


def _has_any(history: History, names: Sequence[str]) -> bool:
    return any(points(history, name.format(mode)) for name in names for mode in _COLOURS)
