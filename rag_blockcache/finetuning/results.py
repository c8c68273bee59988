"""What a run came to, and what it writes of that: record, curves, card and history."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rag_blockcache.finetuning.card import write_card
from rag_blockcache.finetuning.curves import HISTORY_FILE, History, draw_curves, write_history
from rag_blockcache.finetuning.examples import DataFile
from rag_blockcache.finetuning.network import Trainee
from rag_blockcache.finetuning.packing import IGNORED, Row
from rag_blockcache.finetuning.recipe import Recipe
from rag_blockcache.finetuning.rows import TrainingRows
from rag_blockcache.training_record import TrainingRecord

_PACKAGES = ("rag_blockcache", "torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class TrainingReport:
    """What a run came to.

    Attributes:
        folder: Where the weights are, with their record, card and curves.
        record: What the weights say of themselves.
        history: What was logged, by step: ``loss``, ``loss_block``, ``loss_full``, ``eval_...``.
        hardware: Where it ran.
        seconds: Time of training, since it was last resumed.
    """

    folder: Path
    record: TrainingRecord
    history: History
    hardware: Mapping[str, str]
    seconds: float


def record_of(
    recipe: Recipe, trainee: Trainee, files: Sequence[DataFile], data: TrainingRows
) -> TrainingRecord:
    """Write down what was trained on what."""
    return TrainingRecord(
        block_fine_tuned="block" in recipe.mode_pair,
        base_model=recipe.model_name,
        base_revision=trainee.base_revision,
        base_fingerprint=trainee.base_fingerprint,
        passage_format=recipe.passage_format,
        preamble=recipe.preamble,
        blocks_see=recipe.blocks_see,
        seed=recipe.seed,
        data=[
            {
                "name": file.name,
                "sha256": file.sha256,
                "passages_sha256": file.passages_sha256,
                "num_examples": len(file.examples),
                "num_samples": data.num_samples[index],
            }
            for index, file in enumerate(files)
        ],
        recipe=recipe.described(),
        totals={
            "steps": recipe.steps,
            "samples": sum(row.num_samples for row in data.rows),
            "questions": sum(row.num_questions for row in data.rows),
            "tokens": sum(len(row.token_ids) for row in data.rows),
            "answer_tokens": sum(_num_learned(row, of_text=False) for row in data.rows),
            "text_tokens": sum(_num_learned(row, of_text=True) for row in data.rows),
        },
        versions={name: _version(name) for name in _PACKAGES},
    )


def write_results(
    record: TrainingRecord,
    logged: Sequence[Mapping[str, float]],
    seconds: float,
    out: Path,
    *,
    is_adapter: bool,
) -> None:
    """Write the curves, the card, and last the history, which says that the run is complete."""
    history = _history(logged)
    draw_curves(history, out)
    write_card(record, history, out, is_adapter=is_adapter)
    content = {"hardware": _hardware(), "seconds": seconds, "record": asdict(record), "history": history}
    write_history(content, out)


def read_results(out: Path) -> TrainingReport:
    """Read what a complete run came to."""
    content = json.loads((out / HISTORY_FILE).read_text(encoding="utf-8"))
    return TrainingReport(
        folder=out,
        record=TrainingRecord(**content["record"]),
        history=content["history"],
        hardware=content["hardware"],
        seconds=content["seconds"],
    )


def _num_learned(row: Row, *, of_text: bool) -> int:
    return int(((row.labels != IGNORED) & (row.is_text == of_text)).sum())


def _history(logged: Sequence[Mapping[str, float]]) -> History:
    """Keep what was measured, one entry a step; what the Trainer says of its own speed is left out."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in logged:
        kept = {
            name: value
            for name, value in entry.items()
            if not name.startswith(("train_", "epoch", "total_flos", "step"))
        }
        by_step.setdefault(int(entry["step"]), {"step": entry["step"]}).update(kept)
    return list(by_step.values())


def _hardware() -> dict[str, str]:
    found = {"processor": platform.machine(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "uninstalled"
