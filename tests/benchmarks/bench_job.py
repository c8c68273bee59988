"""How the time and the memory of the indexing job grow with the corpus.

    python tests/benchmarks/bench_job.py

What: passages of 110 words of the Python language reference are indexed by ``rag-blockcache
index-and-prefill``, each time in a process and a folder of its own: a corpus, and one eight times as large.
The two take turns. The seconds are those of the job's own stages; how many times those of the smaller corpus
the larger one takes is said of encoding and writing, for embedding begins with the loading of its model. The
memory is the most that was resident in the whole process, models included.

How it can mislead: both corpora fit into the page cache, where written blocks count as the system's
memory, not as that of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from language_reference import reference_text, smollm2_path
from small_models import minilm_path

from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.loading import load_model

WORDS = 110  # of a passage
TIMES = 8
COLUMNS = {
    "num_passages": "passages",
    "num_tokens": "tokens",
    "job_seconds": "the job",
    "encode_seconds": "of it encoding and writing",
    "times": "times the smaller",
    "peak_bytes": "peak memory",
    "written_bytes": "written",
}


def run_job(passages: list[str]) -> dict[str, Any]:
    """Index passages in a process of its own; returns its report, and the most that was resident in it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(passages))
        source, report = Path(folder, "passages.jsonl"), Path(folder, "report.json")
        source.write_text(rows, encoding="utf-8")
        command = [sys.executable, "-m", "rag_blockcache.cli", "index-and-prefill", str(source), "--json"]
        command += ["--out", str(Path(folder, "index")), "--model", str(smollm2_path())]
        command += ["--embedder", str(minilm_path()), "--device", "cpu"]
        with report.open("wb") as written:
            job = subprocess.Popen(command, stdout=written, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(job.pid, 0)
        if status:
            raise SystemExit(f"the job failed: {' '.join(command)}")
        return {**json.loads(report.read_text(encoding="utf-8")), "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how the job grows with the corpus.")
    parser.add_argument("--passages", type=int, default=70, help="of the smaller corpus")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    words = reference_text().split()
    cut = [" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS, WORDS)]
    sizes = (options.passages, TIMES * options.passages)
    if sizes[1] > len(cut):
        raise SystemExit(f"the text has {len(cut)} passages, {sizes[1]} are needed; lower --passages")
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for number in range(options.repeats):
        for size in sizes:
            found[size].append(run_job(cut[:size]))
            print(f"round {number + 1}, {size} passages: {found[size][-1]['seconds']}", file=sys.stderr)
    encoding = {size: [run["seconds"]["prefill"] for run in runs] for size, runs in found.items()}
    ratios = [large / small for small, large in zip(*encoding.values(), strict=True)]
    rows = [
        {
            "num_passages": size,
            "num_tokens": runs[0]["num_tokens"],
            "job_seconds": statistics.median(sum(run["seconds"].values()) for run in runs),
            "encode_seconds": statistics.median(encoding[size]),
            "times": statistics.median(ratios) if size == sizes[1] else None,
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "written_bytes": runs[0]["num_bytes"],
        }
        for size, runs in found.items()
    ]
    result = {
        "command": f"python tests/benchmarks/bench_job.py --passages {options.passages}",
        **asdict(Environment.of(load_model(smollm2_path(), device="cpu"), "SmolLM2-135M-Instruct")),
        "repeats": options.repeats,
        "times_from": min(ratios),
        "times_to": max(ratios),
        "columns": COLUMNS,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
