"""What the benchmarks run on by default: SmolLM2, and passages of the Python language reference."""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from small_models import smollm2_path

from rag_blockcache.cli import app


def reference_text() -> str:
    """Return all of it that comes with Python."""
    return "\n\n".join(sorted(set(topics.values())))


def run_bench(name: str, *, takes_text: bool) -> None:
    """Run ``rag-blockcache bench NAME`` with the options that were typed, and defaults for what was not."""
    typed = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--json"]
        if not any(option.startswith(("--model", "--shape")) for option in typed):
            options += ["--model", str(smollm2_path())]
        if takes_text and not any(option.startswith(("--text", "--shape")) for option in typed):
            text = Path(folder) / "reference.txt"
            text.write_text(reference_text(), encoding="utf-8")
            options += ["--text", str(text)]
        app(["bench", name, *options, *typed])
