"""Samples to rows: several samples stand in one row, and do not see one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rag_blockcache.finetuning.samples import Ints, Sample

_OPEN_ROWS = 8  # that wait for a sample of their size; more leave less room unused, and mix the order more
IGNORED = -100  # label of a token that is not learned, as transformers has it
_PADDING = {"labels": IGNORED, "sample_ids": -1}  # all else is padded with 0


@dataclass(frozen=True)
class Row:
    """Samples one behind the other.

    Attributes:
        token_ids: ``(num_tokens,)``.
        positions: ``(num_tokens,)``, see ``Sample``; each sample begins at 0.
        sample_ids: ``(num_tokens,)``: which sample of the row a token belongs to, from 0.
        block_ids: ``(num_tokens,)``, see ``Sample``.
        branch_ids: ``(num_tokens,)``, see ``Sample``.
        labels: ``(num_tokens,)``: the token itself where it is learned, ``IGNORED`` elsewhere.
        is_block_mode: ``(num_tokens,)``: whether the sample is learned under the block mask.
        is_text: ``(num_tokens,)``: whether the sample is general text.
        files: ``(num_samples,)``: index of the file that each sample is from.
        num_questions: Questions of all samples.
    """

    token_ids: Ints
    positions: Ints
    sample_ids: Ints
    block_ids: Ints
    branch_ids: Ints
    labels: Ints
    is_block_mode: Ints
    is_text: Ints
    files: Ints
    num_questions: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Row:
        """Put samples into a row."""
        lengths = [len(sample.token_ids) for sample in samples]
        labels = [np.where(sample.is_learned, sample.token_ids, np.int32(IGNORED)) for sample in samples]
        return cls(
            token_ids=np.concatenate([sample.token_ids for sample in samples]),
            positions=np.concatenate([sample.positions for sample in samples]),
            sample_ids=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
            block_ids=np.concatenate([sample.block_ids for sample in samples]),
            branch_ids=np.concatenate([sample.branch_ids for sample in samples]),
            labels=np.concatenate(labels),
            is_block_mode=np.repeat([np.int32(sample.mode == "block") for sample in samples], lengths),
            is_text=np.repeat([np.int32(sample.is_text) for sample in samples], lengths),
            files=np.array([sample.file for sample in samples], dtype=np.int32),
            num_questions=sum(sample.num_questions for sample in samples),
        )

    @property
    def num_samples(self) -> int:
        """Samples in the row."""
        return len(self.files)


def pack(samples: Iterable[Sample], row_tokens: int) -> Iterator[Row]:
    """Pack samples into rows of at most ``row_tokens`` tokens, about in their order.

    Each goes into the fullest row that has room for it; where none has, the fullest is done.
    """
    waiting: list[list[Sample]] = []

    def length(row: Sequence[Sample]) -> int:
        return sum(len(sample.token_ids) for sample in row)

    for sample in samples:
        fitting = [row for row in waiting if length(row) + len(sample.token_ids) <= row_tokens]
        if fitting:
            max(fitting, key=length).append(sample)
            continue
        if len(waiting) == _OPEN_ROWS:
            fullest = max(range(_OPEN_ROWS), key=lambda index: length(waiting[index]))
            yield Row.of(waiting.pop(fullest))
        waiting.append([sample])
    for row in waiting:
        yield Row.of(row)


def collate(rows: Sequence[Row], *, padded_to: int | None = None) -> dict[str, Tensor]:
    """Turn the one row of a batch into what the model is called with, ``(1, num_tokens)`` each.

    Args:
        rows: One row; a longer row does the work of several.
        padded_to: Length that all batches get, for compiled kernels; None pads nothing.
    """
    [row] = rows
    columns: dict[str, Any] = {
        "input_ids": row.token_ids,
        "position_ids": row.positions,
        "labels": row.labels,
        "sample_ids": row.sample_ids,
        "block_ids": row.block_ids,
        "branch_ids": row.branch_ids,
        "is_block_mode": row.is_block_mode,
        "is_text": row.is_text,
    }
    batch = {name: torch.from_numpy(values).long()[None] for name, values in columns.items()}
    return _padded(batch, padded_to or 0)


def part_of(batch: Mapping[str, Tensor], is_wanted: Tensor, *, multiple_of: int = 1) -> dict[str, Tensor]:
    """Return a batch of some samples alone, in which they give the logits that they give in the whole one.

    Args:
        batch: See ``collate``.
        is_wanted: ``(num_tokens,)``, bool, alike for all tokens of a sample; under full attention, stand-ins
            may be left out.
        multiple_of: To whose next multiple the part is padded, for compiled kernels.
    """
    part = {name: values[:, is_wanted] for name, values in batch.items()}
    return _padded(part, -(-part["input_ids"].shape[1] // multiple_of) * multiple_of)


def _padded(batch: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    room = max(length - batch["input_ids"].shape[1], 0)
    return {name: pad(values, (0, room), value=_PADDING.get(name, 0)) for name, values in batch.items()}
