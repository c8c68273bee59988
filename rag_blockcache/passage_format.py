"""How passages and a question are put to a model: the formats on offer, and what one of your own needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.passages import Passage


@dataclass(frozen=True)
class PassageFormat:
    """How passages and question are put to the model.

    Attributes:
        name: To choose it by.
        instruction: Stands before the passages.
        passage: One passage that has a title; ``{title}`` and ``{text}`` are filled in.
        untitled: One passage that has none.
        question: Stands after the passages; ``{question}`` is filled in.
        separator: Stands behind each passage, and is computed as part of the prompt. With one, a block holds
            no white space at its ends.
    """

    name: str
    instruction: str
    passage: str
    untitled: str
    question: str
    separator: str = ""

    def render(self, passage: Passage) -> str:
        """Return the text of one passage as the model reads it."""
        filled = {"{title}": passage.title, "{text}": passage.text}
        template = self.passage if passage.title else self.untitled
        shown = re.sub(r"\{title\}|\{text\}", lambda place: filled[place[0]], template)
        return shown.strip() if self.separator else shown

    def ask(self, question: str) -> str:
        """Return the question as the model reads it."""
        return self.question.replace("{question}", question)


# The prompt that the released Block-Attention models were trained with, to the letter (arXiv 2409.15355).
PAPER = PassageFormat(
    name="paper",
    instruction=(
        "You are an intelligent AI assistant. Please answer questions based on the user's instructions. "
        "Below are some reference documents that may help you in answering the user's question.\n\n"
    ),
    passage="- Title: {title}\n{text}\n",
    untitled="- {text}\n",
    question=(
        "\n\nPlease write a high-quality answer for the given question using only the provided search "
        "documents (some of which might be irrelevant).\nQuestion: {question}\n"
    ),
)
PLAIN = PassageFormat(
    name="plain",
    instruction="Answer the question from these passages.\n\n",
    passage="{title}\n{text}\n\n",
    untitled="{text}\n\n",
    question="Question: {question}",
)
# The text of a passage and nothing else, which is how frameworks show it: blocks are found in any prompt.
VERBATIM = PassageFormat(
    name="verbatim",
    instruction=PLAIN.instruction,
    passage="{text}",
    untitled="{text}",
    question=PLAIN.question,
    separator="\n\n",
)
# Hands the passages to a chat template that reads ``documents=`` (Granite, Command R); see ``prompt.Prompt``.
TEMPLATE = PassageFormat(name="template", instruction="", passage="", untitled="", question="{question}")
FORMATS = {chosen.name: chosen for chosen in (PAPER, PLAIN, VERBATIM, TEMPLATE)}


def format_named(chosen: str | PassageFormat) -> PassageFormat:
    """Return a format by its name in ``FORMATS``, or one of the user's own if it can be filled in.

    Raises:
        InvalidInputError: If the name is unknown, or passages or question have no place in the format.
    """
    if isinstance(chosen, str):
        if chosen not in FORMATS:
            raise InvalidInputError(f"passage format {chosen!r} is unknown; use one of {sorted(FORMATS)}")
        return FORMATS[chosen]
    if chosen != TEMPLATE:
        for attribute, place in (("passage", "{text}"), ("untitled", "{text}"), ("question", "{question}")):
            if place not in getattr(chosen, attribute):
                raise InvalidInputError(
                    f"passage format {chosen.name!r} has no {place} in its {attribute}; add it there"
                )
    return chosen
