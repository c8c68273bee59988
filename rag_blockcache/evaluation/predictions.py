"""Every prediction on a line of its own, so that a run can be killed at any moment and read by a person."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_blockcache.errors import InvalidInputError, StoreError

_VERSION = 2  # of the lines, and of what arms do: a rule that changes answers asks for another folder
_HASHED = {"model": "another model, adapter or dtype", "preamble": "another preamble"}  # settings, for people


@dataclass(frozen=True)
class Prediction:
    """What one arm made of one question.

    Attributes:
        key: ``QaExample.key``.
        example_id: Its name in the data set.
        dataset: Name of the benchmark.
        variant: How the passages were rearranged.
        arm: Name of the arm.
        question: What was asked.
        gold: Gold answers.
        answer: What the model wrote.
        token_ids: The same as tokens, the end-of-sequence token included.
        is_correct: Whether a gold answer stands in it; None, as the next two, without gold answers.
        is_exact: Whether it is a gold answer.
        f1: Over words.
        num_passages: Of the question, shown or not.
        gold_position: Place of the first gold passage, from 1; None if none is marked.
        num_prompt_tokens: Length of the prompt.
        num_passage_tokens: Tokens of its passages.
        num_recomputed_tokens: Of these, how many the prefill pass computed.
        num_answer_tokens: Tokens of full attention's own answer, along which arms are compared.
        divergence: Sum over them of KL(full ‖ arm), in nats.
        num_same_tokens: How many of them both find likeliest.
        answer_log_likelihood: Of full attention's answer under this arm, in nats.
        first_divergence: KL(full ‖ arm) at the first token, in nats.
        first_is_same: Whether both begin with the same token.
        num_gold_tokens: Tokens of the first gold answer; None, as the next, where it was not scored.
        gold_log_likelihood: Of the first gold answer under this arm, in nats.
        ttft_seconds: Time to first token, asked alone with the blocks in memory; None where not timed.
    """

    key: str
    example_id: str
    dataset: str
    variant: str
    arm: str
    question: str
    gold: tuple[str, ...]
    answer: str
    token_ids: tuple[int, ...]
    is_correct: bool | None
    is_exact: bool | None
    f1: float | None
    num_passages: int
    gold_position: int | None
    num_prompt_tokens: int
    num_passage_tokens: int
    num_recomputed_tokens: int
    num_answer_tokens: int
    divergence: float
    num_same_tokens: int
    answer_log_likelihood: float
    first_divergence: float
    first_is_same: bool
    num_gold_tokens: int | None
    gold_log_likelihood: float | None
    ttft_seconds: float | None


class PredictionLog:
    """The predictions of a run, in memory and, in a directory, on disk as they come.

    Args:
        directory: Holds ``predictions.jsonl`` and ``run.json``; None keeps nothing.
        settings: All that predictions depend on beside question and arm; values that JSON can hold.

    Raises:
        InvalidInputError: If the directory holds predictions made with other settings.
        StoreError: If its lines were damaged by others; one that was cut off by the end of a run is dropped.
    """

    def __init__(self, directory: Path | str | None, settings: Mapping[str, Any]) -> None:
        self._predictions: dict[tuple[str, str], Prediction] = {}
        self._path: Path | None = None
        if directory is not None:
            folder = Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
            _check_settings(folder / "run.json", {"version": _VERSION, **settings})
            self._path = folder / "predictions.jsonl"
            for prediction in _recovered(self._path):
                self._predictions[prediction.key, prediction.arm] = prediction

    def get(self, key: str, arm: str) -> Prediction | None:
        """Return the prediction of an arm for an example, by ``QaExample.key``; None if there is none."""
        return self._predictions.get((key, arm))

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions, which are on disk when this returns."""
        predictions = list(predictions)
        if self._path is not None:
            lines = [json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in predictions]
            with self._path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        self._predictions |= {(each.key, each.arm): each for each in predictions}


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compare settings with those on record, or record them."""
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return
    try:
        known = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}); use another directory, or delete this one") from error
    changed = [name for name in sorted({*known, *settings}) if known.get(name) != settings.get(name)]
    if changed:
        was = ", ".join(
            _HASHED.get(name) or f"{name} {known.get(name)!r} (now {settings.get(name)!r})"
            for name in changed
        )
        raise InvalidInputError(
            f"{path.parent} holds predictions made with {was}; use another directory, or the same settings"
        )


def _recovered(path: Path) -> list[Prediction]:
    """Read all lines; a last one that was not finished is cut off, so that new ones start on their own."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            found.append(
                Prediction(**row | {"gold": tuple(row["gold"]), "token_ids": tuple(row["token_ids"])})
            )
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(
                f"line {number} of {path} is no prediction ({error}); remove it, and it is made again"
            ) from error
    return found
