"""Run every benchmark, ``python tests/benchmarks``, and keep its result beside the documentation.

A benchmark is a script ``bench_NAME.py`` in this folder whose last line of output is one JSON
object; see ``docs/generate_benchmarks.py`` for what the object holds. Names given as arguments run
only those. A benchmark that fails leaves the result of the time before.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "docs" / "benchmarks"


def run(script: Path) -> None:
    print(f"== {script.stem}", flush=True)
    lines = []
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"{script} failed with exit code {process.returncode}")
    result = json.loads(lines[-1])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{script.stem.removeprefix('bench_')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    scripts = {script.stem.removeprefix("bench_"): script for script in sorted(HERE.glob("bench_*.py"))}
    if unknown := set(sys.argv[1:]) - set(scripts):
        sys.exit(f"no benchmark {sorted(unknown)}; there are {sorted(scripts)}")
    for name in sys.argv[1:] or scripts:
        run(scripts[name])
