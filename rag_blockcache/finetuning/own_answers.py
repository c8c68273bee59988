"""Answers to questions that have none: the model's own, under full attention, for it to keep its manner."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rag_blockcache.finetuning.examples import DataFile, Example, QuestionExample, TextExample
from rag_blockcache.finetuning.network import Trainee, served_attention
from rag_blockcache.finetuning.progress import Tell
from rag_blockcache.finetuning.samples import SampleMaker

_BATCH = 16
_MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class _Open:
    """A question without an answer, and the tokens of its prompt."""

    name: str
    prompt: Sequence[int]


def answer_missing(
    files: Sequence[DataFile], trainee: Trainee, maker: SampleMaker, path: Path, tell: Tell
) -> list[DataFile]:
    """Let the model answer greedily what has no answer yet.

    Args:
        files: What is trained on, or measured on.
        trainee: The model, before training.
        maker: Makes prompts.
        path: Answers are kept here as they come, so that a run that was killed goes on.
        tell: Told how far it has come.

    Returns:
        The files with all answers; questions to which the model says nothing are left out.
    """
    known = _known(path)
    missing = [each for each in _open(files, maker) if each.name not in known]
    missing.sort(key=lambda each: len(each.prompt))  # so that little of a batch is padding
    _answer_all(missing, known, trainee, path, tell)
    return [_completed(file, known) for file in files]


def _answer_all(
    missing: Sequence[_Open], known: dict[str, str], trainee: Trainee, path: Path, tell: Tell
) -> None:
    """Answer in batches, and keep each batch in memory and on disk."""
    if not missing:
        return
    with path.open("a", encoding="utf-8") as kept:
        kept.write("\n" if known else "")  # the last line may have been cut
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            for each, answer in zip(batch, _generate(trainee, batch), strict=True):
                known[each.name] = answer
                kept.write(json.dumps({"question": each.name, "answer": answer}) + "\n")
            kept.flush()
            tell(f"answered {start + len(batch):,} of {len(missing):,} questions")


def _open(files: Sequence[DataFile], maker: SampleMaker) -> Iterator[_Open]:
    for file in files:
        for index, example in enumerate(file.examples):
            if isinstance(example, QuestionExample) and not example.answer:
                prompt = maker.prompt(example, room=_MAX_NEW_TOKENS)
                if prompt is not None:
                    yield _Open(_name(file, index), prompt)


def _name(file: DataFile, index: int) -> str:
    return f"{file.sha256[:16]}/{index}"


def _known(path: Path) -> dict[str, str]:
    """Read answers that are there already; a line that was cut is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["question"]] = row["answer"]
    return found


def _completed(file: DataFile, answers: dict[str, str]) -> DataFile:
    examples: list[Example] = []
    for index, example in enumerate(file.examples):
        if isinstance(example, QuestionExample) and not example.answer:
            example = dataclasses.replace(example, answer=answers.get(_name(file, index), ""))
        if isinstance(example, TextExample) or example.answer:
            examples.append(example)
    return dataclasses.replace(file, examples=examples)


@torch.inference_mode()
def _generate(trainee: Trainee, batch: Sequence[_Open]) -> list[str]:
    network: Any = trainee.network.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    network.eval()
    longest = max(len(each.prompt) for each in batch)
    padding = [[0] * (longest - len(each.prompt)) for each in batch]
    token_ids = torch.tensor([[*pad, *each.prompt] for pad, each in zip(padding, batch, strict=True)])
    is_token = torch.tensor([[0] * len(pad) + [1] * (longest - len(pad)) for pad in padding])
    with served_attention(trainee):
        found = network.generate(
            input_ids=token_ids.to(network.device),
            attention_mask=is_token.to(network.device),
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=trainee.closing[-1],
        )
    texts: list[str] = trainee.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]
