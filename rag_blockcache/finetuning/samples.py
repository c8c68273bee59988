"""Examples to samples: the tokens that serving would compute, cut into the same segments."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rag_blockcache.conditioning import STAND_INS, BlocksSee
from rag_blockcache.finetuning.companions import Companions
from rag_blockcache.finetuning.examples import ChatExample, Example, QuestionExample, TextExample
from rag_blockcache.finetuning.recipe import Mode
from rag_blockcache.passage_format import PassageFormat
from rag_blockcache.passages import Excerpt, Passage
from rag_blockcache.prompt import Prompt, Segment
from rag_blockcache.request import Chat

_SHORTEST_BLOCK = 48  # characters of a paragraph; shorter ones are not worth a block when serving either

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer, or several that begin alike: behind the same passages, each its own branch.

    General text is a sample too, without a branch, under full attention.

    Attributes:
        token_ids: ``(num_tokens,)``: what the prompts have in common, then branch by branch the rest of a
            prompt and its answer.
        positions: ``(num_tokens,)``: where a token stands in its prompt; every branch goes on from where the
            common part ends.
        block_ids: ``(num_tokens,)``: the number of the block that a token belongs to, from 1, or 0 for text,
            which sees everything before it. All 0 under full attention. Less the number of a block for the
            stand-ins before it, which are no part of the prompt: nothing but that block sees them.
        branch_ids: ``(num_tokens,)``: the number of the branch that a token belongs to, from 1, or 0 for what
            they have in common. No branch sees another.
        is_learned: ``(num_tokens,)``, bool: the tokens of answers, with those that end them; of general text
            all but the first.
        mode: Under which attention it is learned.
        file: Index of the file that its examples are from.
    """

    token_ids: Ints
    positions: Ints
    block_ids: Ints
    branch_ids: Ints
    is_learned: NDArray[np.bool_]
    mode: Mode
    file: int = 0

    @property
    def is_text(self) -> bool:
        """Whether it is general text."""
        return not self.num_questions

    @property
    def num_questions(self) -> int:
        """Prompts in the sample."""
        return int(self.branch_ids.max())


class SampleMaker:
    """Makes samples for one tokenizer.

    Args:
        tokenizer: The model's.
        closing: Tokens behind every answer, see ``closing_tokens``.
        passage_format: In which passages are shown.
        preamble: Text before them; None for that of the format.
        min_passages: Fewest passages of a sample, if its example has as many.
        max_tokens: Longest sample; stand-ins, which are in no prompt, are not counted.
        row_tokens: Room for a sample with its stand-ins; None for as much as it takes.
        blocks_see: What blocks attend to beside themselves, see ``conditioning``.
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
        row_tokens: int | None = None,
        blocks_see: BlocksSee = "themselves",
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, Prompt(tokenizer, passage_format, preamble)
        self._stand_ins = self._prompt.run_of_passages(STAND_INS) if blocks_see == "stand-ins" else ()
        self._closing = tuple(closing)
        self._min_passages, self._max_tokens = min_passages, max_tokens
        self._row_tokens = row_tokens

    def make(
        self,
        example: Example,
        mode: Mode,
        source: random.Random | None,
        companions: Companions | None = None,
    ) -> Sample | None:
        """Make the sample of an example.

        Args:
            example: What to make it from.
            mode: Under which attention it is learned.
            source: Chooses how many passages there are, which, and in what order; those that the answer
                rests on always stay. None takes all as they stand.
            companions: Finds further questions to ask behind the chosen passages, as many as fit; None asks
                that of the example alone.

        Returns:
            The sample; passages that nothing rests on are left out until it fits, and text is cut. None if
            it never does.
        """
        if isinstance(example, TextExample):
            return self._text(example)
        if isinstance(example, ChatExample):
            chat = Chat(messages=example.messages)
            segments = self._prompt.chat_segments(chat, _Paragraphs(example))
            return self._joined(segments, [self._branch((), example.answer)], mode)
        chosen = list(range(len(example.passages)))
        if source is not None:
            chosen = choose_passages(example.is_needed, self._min_passages, source)
        while True:
            passages = [example.passages[index] for index in chosen]
            further = companions.behind(example, passages) if companions is not None else []
            sample = self._asked([example, *further], passages, mode)
            spare = [index for index in chosen if not example.is_needed[index]]
            if sample is not None or not spare:
                return sample
            chosen.remove(spare[-1])

    def prompt(self, example: QuestionExample, *, room: int) -> list[int] | None:
        """Return the tokens of a question with all its passages; None if ``room`` more would not fit."""
        segments = self._prompt.segments(example.question, example.passages)
        token_ids = [token for segment in segments for token in segment.token_ids]
        return token_ids if len(token_ids) + room <= self._max_tokens else None

    def _text(self, example: TextExample) -> Sample | None:
        token_ids = np.array(self._tokenizer(example.text).input_ids[: self._max_tokens], dtype=np.int32)
        if len(token_ids) < 2:  # there is nothing to foretell
            return None
        places, none = np.arange(len(token_ids), dtype=np.int32), np.zeros(len(token_ids), dtype=np.int32)
        return Sample(token_ids, places, none, none, is_learned=places > 0, mode="full")

    def _asked(
        self, examples: Sequence[QuestionExample], passages: Sequence[Passage], mode: Mode
    ) -> Sample | None:
        """Ask the first question, and those of the others that fit, behind the same passages."""
        segments = self._prompt.segments(examples[0].question, passages)
        common = 1 + max((i for i, segment in enumerate(segments) if segment.kind == "passage"), default=-1)
        branches = [self._branch(segments[common:], examples[0].answer)]
        num_tokens = sum(len(segment.token_ids) for segment in segments[:common]) + branches[0].num_tokens
        for example in examples[1:]:
            further = self._prompt.segments(example.question, passages)
            branch = self._branch(further[common:], example.answer)
            if further[:common] == segments[:common] and num_tokens + branch.num_tokens <= self._max_tokens:
                branches.append(branch)
                num_tokens += branch.num_tokens
        return self._joined(segments[:common], branches, mode)

    def _branch(self, segments: Sequence[Segment], answer: str) -> _Branch:
        asked = [token for segment in segments for token in segment.token_ids]
        return _Branch(asked, (*self._prompt.text_tokens(answer), *self._closing))

    def _joined(self, common: Sequence[Segment], branches: Sequence[_Branch], mode: Mode) -> Sample | None:
        runs = list(self._runs(common, branches, mode))
        lengths = [len(run.token_ids) for run in runs]
        num_shown = sum(len(run.token_ids) for run in runs if run.block >= 0)
        if num_shown > self._max_tokens or (self._row_tokens and sum(lengths) > self._row_tokens):
            return None
        places = [run.start + np.arange(len(run.token_ids), dtype=np.int32) for run in runs]
        return Sample(
            token_ids=np.array([token for run in runs for token in run.token_ids], dtype=np.int32),
            positions=np.concatenate(places).astype(np.int32),
            block_ids=np.repeat(np.array([run.block for run in runs], dtype=np.int32), lengths),
            branch_ids=np.repeat(np.array([run.branch for run in runs], dtype=np.int32), lengths),
            is_learned=np.repeat(np.array([run.is_learned for run in runs], dtype=np.bool_), lengths),
            mode=mode,
        )

    def _runs(self, common: Sequence[Segment], branches: Sequence[_Branch], mode: Mode) -> Iterator[_Run]:
        """Yield the tokens of a sample in its order; stand-ins end where their block begins, before 0 too."""
        place = 0
        for number, segment in enumerate(common, 1):
            is_block = mode == "block" and segment.kind == "passage"
            if is_block and self._stand_ins:
                yield _Run(self._stand_ins, place - len(self._stand_ins), block=-number)
            yield _Run(segment.token_ids, place, block=number if is_block else 0)
            place += len(segment.token_ids)
        for branch_number, branch in enumerate(branches, 1):
            yield _Run(branch.asked, place, branch=branch_number)
            yield _Run(branch.answer, place + len(branch.asked), branch=branch_number, is_learned=True)


@dataclass(frozen=True)
class _Run:
    """Tokens one behind the other that are alike in all else; see ``Sample``."""

    token_ids: Sequence[int]
    start: int
    block: int = 0
    branch: int = 0
    is_learned: bool = False


@dataclass(frozen=True)
class _Branch:
    """What follows the passages: the rest of a prompt, and its answer."""

    asked: Sequence[int]
    answer: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.asked) + len(self.answer)


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
