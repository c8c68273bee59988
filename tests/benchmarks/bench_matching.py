"""Time to find 20 passages in a prompt of 22 KiB, by the number of passages known; memory of the anchors.

    python tests/benchmarks/bench_matching.py

What: registries of 1,000, 100,000 and 1,000,000 texts, each in SQLite in a temporary folder. A prompt holds
an instruction, 20 registered passages of about 1.1 KiB with their headers, separators, and a question; the
matcher finds them on one core. Timed is the whole of ``Matcher.find``: hashing every window, looking it up,
reading the texts, comparing them. Median of 100 calls after ten to warm up. ``cut`` is the same prompt with
every passage cut in half; ``hinted`` has all 20 given as hints to a matcher that knows none of them. Memory
is that of the arrays that stay in memory. Opening is the first look-up of a registry that was just opened.

How it can mislead: passages that are not in the prompt are short (200 bytes), so that a million of them are
made in a few minutes; their length matters for the disk only. Texts are random words, so few windows repeat;
a corpus of near-duplicates compares more candidates. The prompt's own texts are in the page cache. Adding
one passage is mostly waiting for the disk to confirm it.

Other numbers of passages: ``--sizes 1000 5000``.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import time
from datetime import UTC, datetime

from rag_blockcache.matcher import Matcher
from rag_blockcache.passage_registry import PassageRegistry

COLUMNS = {
    "num_known": "known passages",
    "find_seconds": "find 20 in 22 KiB",
    "slowest_seconds": "slowest of 100",
    "cut_seconds": "all cut in half",
    "hinted_seconds": "by hints alone",
    "open_seconds": "open",
    "anchor_bytes": "memory",
    "add_seconds": "add one",
}
SEPARATOR = "\n\n"


def passages_of(num_passages: int, num_bytes: int, seed: int):
    """Yield passages of random words under a header that names one of a few files."""
    source = random.Random(seed)
    words = ["".join(source.choices("etaoinshrdlu", k=source.randint(2, 9))) for _ in range(5000)]
    for number in range(num_passages):
        header = f"file_path: /corpus/reports/{number % 1000:04}.md\nlanguage: en\n\n"
        text = " ".join(source.choices(words, k=num_bytes // 6))
        yield header + text[: num_bytes - len(header)].strip()


def timed(call, repeats: int = 1) -> list[float]:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def time_find(matcher: Matcher, passages: list[str], shown: list[str], hints=()) -> list[float]:
    """Time finding passages of which a prompt shows all, or the beginnings."""
    prompt = SEPARATOR.join(["Answer from these sources.", *shown, "Who wrote the report, and why?"])
    found = matcher.find(prompt, hints)
    assert [match.text for match in found] == passages, "the matcher missed a passage"
    timed(lambda: matcher.find(prompt, hints), 10)
    return timed(lambda: matcher.find(prompt, hints), 100)


def measure(num_known: int, passages: list[str]) -> dict[str, float]:
    halves = [text[: len(text) // 2] for text in passages]
    with tempfile.TemporaryDirectory(prefix="rag-blockcache-bench-") as directory:
        with PassageRegistry(directory) as registry:
            registry.add(passages)
            registry.add(passages_of(num_known - len(passages), 200, seed=1))
        with PassageRegistry(directory) as registry, PassageRegistry(f"{directory}/empty") as empty:
            [open_seconds] = timed(lambda: registry.anchors)
            matcher = Matcher(registry)
            whole = time_find(matcher, passages, passages)
            cut = time_find(matcher, passages, halves)
            hinted = time_find(Matcher(empty), passages, passages, hints=passages)
            new = ([text] for text in passages_of(20, 1126, seed=2))
            added = timed(lambda: registry.add(next(new)), 20)
            return {
                "num_known": num_known,
                "find_seconds": statistics.median(whole),
                "slowest_seconds": max(whole),
                "cut_seconds": statistics.median(cut),
                "hinted_seconds": statistics.median(hinted),
                "open_seconds": open_seconds,
                "anchor_bytes": registry.anchors.num_bytes,
                "add_seconds": statistics.median(added),
            }


def cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in itertools.takewhile(str.strip, lines):
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast known passages are found in a prompt.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    sizes = parser.parse_args().sizes
    passages = list(passages_of(20, 1126, seed=0))
    rows = []
    for num_known in sizes:
        rows.append(measure(num_known, passages))
        print({heading: rows[-1][key] for key, heading in COLUMNS.items()}, flush=True)
    default = [1000, 100_000, 1_000_000]
    suffix = "" if sizes == default else f" --sizes {' '.join(map(str, sizes))}"
    result = {
        "command": f"python tests/benchmarks/bench_matching.py{suffix}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu_name(), "cores": "1 core used"},
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("rag_blockcache", "numpy")},
        },
        "columns": COLUMNS,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
