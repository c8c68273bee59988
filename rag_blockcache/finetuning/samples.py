"""Examples to samples: the tokens that serving would compute, cut into the same segments."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rag_blockcache.finetuning.examples import ChatExample, Example, QuestionExample
from rag_blockcache.finetuning.recipe import Mode
from rag_blockcache.passage_format import PassageFormat
from rag_blockcache.passages import Excerpt
from rag_blockcache.prompt import Prompt, Segment
from rag_blockcache.request import Chat

_SHORTEST_BLOCK = 48  # characters of a paragraph; shorter ones are not worth a block when serving either

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    Attributes:
        token_ids: ``(num_tokens,)``; the answer is at the end.
        block_ids: ``(num_tokens,)``: the number of the block that a token belongs to, from 1, or 0 for text,
            which sees everything before it. All 0 under full attention.
        num_answer: Tokens of the answer, with those that end it.
        mode: Under which attention it is learned.
        file: Index of the file that its example is from.
    """

    token_ids: Ints
    block_ids: Ints
    num_answer: int
    mode: Mode
    file: int = 0


class SampleMaker:
    """Makes samples for one tokenizer.

    Args:
        tokenizer: The model's.
        closing: Tokens behind every answer, see ``closing_tokens``.
        passage_format: In which passages are shown.
        preamble: Text before them; None for that of the format.
        min_passages: Fewest passages of a sample, if its example has as many.
        max_tokens: Longest sample.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        closing: Sequence[int],
        *,
        passage_format: str | PassageFormat,
        preamble: str | None,
        min_passages: int,
        max_tokens: int,
    ) -> None:
        self._prompt = Prompt(tokenizer, passage_format, preamble)
        self._closing = tuple(closing)
        self._min_passages, self._max_tokens = min_passages, max_tokens

    def make(self, example: Example, mode: Mode, source: random.Random | None) -> Sample | None:
        """Make the sample of an example.

        Args:
            example: What to make it from.
            mode: Under which attention it is learned.
            source: Chooses how many passages there are, which, and in what order; those that the answer
                rests on always stay. None takes all as they stand.

        Returns:
            The sample; passages that nothing rests on are left out until it fits. None if it never does.
        """
        if isinstance(example, ChatExample):
            chat = Chat(messages=example.messages)
            segments = self._prompt.chat_segments(chat, _Paragraphs(example))
            return self._joined(segments, example.answer, mode)
        chosen = list(range(len(example.passages)))
        if source is not None:
            chosen = choose_passages(example.is_needed, self._min_passages, source)
        while True:
            passages = [example.passages[index] for index in chosen]
            segments = self._prompt.segments(example.question, passages)
            sample = self._joined(segments, example.answer, mode)
            spare = [index for index in chosen if not example.is_needed[index]]
            if sample is not None or not spare:
                return sample
            chosen.remove(spare[-1])

    def prompt(self, example: QuestionExample, *, room: int) -> list[int] | None:
        """Return the tokens of a question with all its passages; None if ``room`` more would not fit."""
        segments = self._prompt.segments(example.question, example.passages)
        token_ids = [token for segment in segments for token in segment.token_ids]
        return token_ids if len(token_ids) + room <= self._max_tokens else None

    def _joined(self, segments: Sequence[Segment], answer: str, mode: Mode) -> Sample | None:
        said = (*self._prompt.text_tokens(answer), *self._closing)
        runs = [*(segment.token_ids for segment in segments), said]
        if sum(map(len, runs)) > self._max_tokens:
            return None
        numbers = [
            index if mode == "block" and segment.kind == "passage" else 0
            for index, segment in enumerate(segments, 1)
        ]
        return Sample(
            token_ids=np.array([token for run in runs for token in run], dtype=np.int32),
            block_ids=np.repeat(np.array([*numbers, 0], dtype=np.int32), [len(run) for run in runs]),
            num_answer=len(said),
            mode=mode,
        )


def choose_passages(is_needed: Sequence[bool], fewest: int, source: random.Random) -> list[int]:
    """Choose how many passages are shown, which of them, and in what order.

    Returns:
        Indices: all that are needed, and some of the others.
    """
    needed = [index for index, each in enumerate(is_needed) if each]
    others = [index for index, each in enumerate(is_needed) if not each]
    least = min(max(fewest - len(needed), 0), len(others))
    chosen = needed + source.sample(others, source.randint(least, len(others)))
    source.shuffle(chosen)
    return chosen


class _Paragraphs:
    """Parts the messages of a chat at blank lines, and makes blocks of what stands between.

    The last paragraph is the question. What a chat calls forth is no passage, but it teaches the model that
    any text may have been encoded on its own.
    """

    def __init__(self, example: ChatExample) -> None:
        self._last = example.messages[-1]["content"]

    def __call__(self, text: str) -> list[str | Excerpt]:
        pieces = text.split("\n\n")
        parts: list[str | Excerpt] = []
        for index, piece in enumerate(pieces):
            shown = piece.strip()
            is_question = text == self._last and index == len(pieces) - 1
            if len(shown) < _SHORTEST_BLOCK or is_question:
                parts.append(piece)
            else:
                before, _, behind = piece.partition(shown)
                parts += [before, Excerpt(shown, shown), behind]
            parts.append("\n\n" if index < len(pieces) - 1 else "")
        return [part for part in parts if part]


def closing_tokens(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens behind an answer, up to the first one that ends generation.

    Args:
        tokenizer: Its chat template tells what stands behind a message of the assistant.
        end_ids: Tokens at which the model stops.
    """
    if tokenizer.chat_template is not None:
        mark = f"ANSWER{secrets.token_hex(8)}"
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
        behind = tokenizer(rendered.partition(mark)[2], add_special_tokens=False).input_ids
        for index, token in enumerate(behind):
            if token in end_ids:
                return tuple(behind[: index + 1])
    return tuple(end_ids[:1])
