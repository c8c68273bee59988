"""What was typed, as results quote it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def typed_command() -> str:
    """Return the command of this process, without folders of this machine."""
    program, *arguments = sys.argv
    script, folder = Path(program), Path.cwd()
    words = [script.name]
    if script.name == "__main__.py":
        words = ["python", "-m", ".".join(_package(script))]
    elif script.suffix == ".py":
        words = ["python", str(script.relative_to(folder) if script.is_relative_to(folder) else script.name)]
    return shlex.join([*words, *map(_shortened, arguments)])


def _package(script: Path) -> list[str]:
    """Return the names of the package that a script is the main module of, the outermost first."""
    names: list[str] = []
    for parent in script.resolve().parents:
        if not (parent / "__init__.py").is_file():
            break
        names.insert(0, parent.name)
    return names


def _shortened(word: str) -> str:
    return Path(word).name if Path(word).is_absolute() else word
