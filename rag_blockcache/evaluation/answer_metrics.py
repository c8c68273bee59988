"""How right an answer is: gold answer contained, exact match, F1, all after SQuAD normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> str:
    """Lower the case, drop ASCII punctuation and English articles, and make all white space one blank.

    Source:
        Evaluation script of SQuAD 1.1, https://rajpurkar.github.io/SQuAD-explorer/
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Tell whether one of the gold answers stands in a text, both normalised.

    This is the accuracy of the Block-Attention paper. It counts characters, not words, so that a short gold
    answer can be part of another word. An answer of which nothing is left never counts.

    Source:
        https://arxiv.org/abs/2409.15355, section 3.2
    """
    found = normalized(text)
    return any(gold in found for gold in map(normalized, answers) if gold)


def contains_words(text: str, answers: Sequence[str]) -> bool:
    """Say whether a normalised gold answer stands in the text as whole words.

    Stricter than ``contains_answer``: an answer of one letter is in nearly every text otherwise.
    """
    found = f" {normalized(text)} "
    return any(f" {gold} " in found for gold in map(normalized, answers) if gold)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text is one of the gold answers, both normalised."""
    return normalized(text) in {gold for gold in map(normalized, answers) if gold}


def f1(text: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall over words, for the gold answer that fits best."""
    return max((_word_f1(normalized(text), gold) for gold in map(normalized, answers)), default=0.0)


def _word_f1(text: str, gold: str) -> float:
    words, gold_words = text.split(), gold.split()
    num_shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * num_shared / (len(words) + len(gold_words)) if num_shared else 0.0
