"""Further questions that the passages of a sample answer: more to learn for the same computation."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rag_blockcache.finetuning.examples import Example, QuestionExample
from rag_blockcache.passages import Passage


class SharedPassages:
    """Finds the questions of a file by the passages that their answers rest on.

    Args:
        examples: Of the file; chats are passed over.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        self._found: dict[tuple[str, str], list[QuestionExample]] = defaultdict(list)
        for example in examples:
            if isinstance(example, QuestionExample) and any(example.is_needed):
                self._found[next(iter(_needed(example)))].append(example)

    def answered_by(self, passages: Sequence[Passage]) -> list[QuestionExample]:
        """Return the questions whose answers rest on these passages and no others."""
        shown = dict.fromkeys(map(_key, passages))
        return [
            example
            for key in shown
            for example in self._found.get(key, ())
            if all(each in shown for each in _needed(example))
        ]


@dataclass(frozen=True)
class Companions:
    """Chooses further questions for one sample.

    Attributes:
        shared: Of the file that the sample is from.
        most: Questions at most.
        source: Chooses.
    """

    shared: SharedPassages
    most: int
    source: random.Random

    def behind(self, example: QuestionExample, passages: Sequence[Passage]) -> list[QuestionExample]:
        """Return other questions than that of the example, each once, that these passages answer."""
        found = {each.question: each for each in self.shared.answered_by(passages)}
        found.pop(example.question, None)
        return self.source.sample(list(found.values()), min(self.most, len(found)))


def _needed(example: QuestionExample) -> Iterable[tuple[str, str]]:
    return (
        _key(each) for each, is_needed in zip(example.passages, example.is_needed, strict=True) if is_needed
    )


def _key(passage: Passage) -> tuple[str, str]:
    return passage.title, passage.text
