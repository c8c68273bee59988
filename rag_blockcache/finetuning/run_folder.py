"""The folder of a run: which run it holds, and how far that has come."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.finetuning.curves import HISTORY_FILE
from rag_blockcache.finetuning.examples import DataFile, sha256_of
from rag_blockcache.finetuning.recipe import Recipe

logger = logging.getLogger(__name__)

ANSWERS_FILE = "own_answers.jsonl"
_RUN_FILE = "run.json"
_WEIGHTS_FILE = "adapter_model.safetensors"  # as PEFT names it


def claim(out: Path, recipe: Recipe, files: Sequence[DataFile]) -> None:
    """Write down which run a folder holds.

    Raises:
        InvalidInputError: If it holds another one, or anything else.
    """
    hashes = [[file.sha256, file.passages_sha256] for file in files]
    run = {**recipe.described(), "sha256": hashes}
    for option, adapter in recipe.adapters.items():
        if (weights := Path(adapter, _WEIGHTS_FILE)).is_file():  # of a folder the record has the name alone
            run[f"{option}_sha256"] = sha256_of(weights)
    path = out / _RUN_FILE
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in run if known.get(name) != run[name])
        if changed:
            raise InvalidInputError(
                f"{out} holds a run with other options ({', '.join(changed)}); "
                "repeat them to go on with it, or choose another --out"
            )
        return
    if out.is_dir() and any(other.suffix != ".unfinished" for other in out.iterdir()):
        raise InvalidInputError(f"{out} holds files that are not of a training run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def is_complete(out: Path) -> bool:
    """Tell whether all that a run writes is there."""
    return (out / HISTORY_FILE).is_file()


def last_checkpoint(out: Path) -> str | None:
    """Return the newest checkpoint that is complete: its state is written last."""
    found = []
    for path in (out / "checkpoints").glob("checkpoint-*"):
        try:
            found.append((json.loads((path / "trainer_state.json").read_bytes())["global_step"], str(path)))
        except (OSError, ValueError, KeyError):
            logger.warning("%s is not complete, an older one is used", path)
    return max(found)[1] if found else None
