"""Run the tests of the integrations with the lowest and the newest versions of both frameworks.

    python tests/compatibility.py [lowest|newest ...]

Each set of versions is installed into a folder of its own, without what it depends on, and put before what is
installed already; so nothing else changes, and the next run finds it there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = {
    "lowest": [  # that pyproject.toml allows, and of the others the newest that go with those
        "llama-index-core==0.14.6",
        "langchain-core==1.4.0",
        "langchain==1.3.7",
        "langchain-classic==1.0.7",
        "langchain-text-splitters==1.1.2",
        "langgraph==1.2.4",
    ],
    "newest": [
        "llama-index-core<0.15",
        "langchain-core<2",
        "langchain<2",
        "langchain-classic<2",
        "langgraph<2",
    ],
}
TESTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("test_llama_index*.py", "test_langchain*.py")
    for path in (ROOT / "tests").glob(pattern)
)
# A newer framework may deprecate what an older one needs; that is for its time, not for a failure now.
OPTIONS = ["-q", "-m", "not slow and not real_weights", "-W", "default", "-p", "no:cacheprovider"]


def installed(name: str) -> Path:
    """Return the folder that holds a set of versions, installing it if it is not there."""
    wanted = "\n".join(VERSIONS[name])
    folder = (
        ROOT / "build/compatibility" / f"{name}-{hashlib.blake2b(wanted.encode(), digest_size=4).hexdigest()}"
    )
    if not folder.is_dir() or name == "newest":
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), *VERSIONS[name]], check=True)
    return folder


def main(names: list[str]) -> int:
    """Run the tests with each set of versions; return how many sets failed."""
    num_failed = 0
    for name in names or list(VERSIONS):
        folder = installed(name)
        found = sorted(path.name.removesuffix(".dist-info") for path in folder.glob("*.dist-info"))
        print(f"{name}: {', '.join(found)}", flush=True)
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "pytest", *OPTIONS, *TESTS]
        num_failed += bool(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
