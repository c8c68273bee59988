"""Answers that follow a JSON schema, and calls of tools that must be made: decoding within a grammar.

The grammar is followed by llguidance, which is optional and has its home here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from rag_blockcache.chat_template import ChatTemplate
from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.grammar import grammar
from rag_blockcache.json_schema import Schema, closed, without_patterns
from rag_blockcache.tool_calls import schemas_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)
_FREE = ("auto", "none")


def constraint(
    tokenizer: PreTrainedTokenizerBase,
    *,
    response_schema: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str = "auto",
    eos_token_ids: Sequence[int] = (),
) -> Constraint | None:
    """Make what keeps one answer within a schema, or makes it call a tool.

    Values are written as ``json.dumps`` does. Objects whose properties are listed get no others, unless the
    schema allows them by name. What a grammar cannot follow (``uniqueItems``, ``not``, ``if``, patterns that
    look ahead) is left to chance, and logged.

    Args:
        tokenizer: Of the model. Its vocabulary is looked through once, in about a second.
        response_schema: JSON schema of the answer. Where tools can be chosen, a call may take its place.
        tools: Functions that can be called, with JSON schemas of their arguments.
        tool_choice: ``"required"`` for a call of any tool, the name of a tool for a call of it; ``"auto"``
            and ``"none"`` ask for no call. It is one call, because small models that may write another one
            do not stop.
        eos_token_ids: All tokens that end an answer; empty for the tokenizer's.

    Returns:
        A logits processor for one call of ``generate()``, for however many rows; None if anything may be
        written.

    Raises:
        InvalidInputError: If a schema cannot be followed, the tool that is to be called is not among the
            tools, or the tokenizer is not a fast one.
        MissingDependencyError: If llguidance is not installed.
    """
    if response_schema is None and tool_choice in _FREE:
        return None
    answer = response_schema if tool_choice in _FREE else None
    called = _called(schemas_of(tools), tool_choice)
    vocabulary = _vocabulary(tokenizer, tuple(sorted(set(eos_token_ids))))
    text = grammar(
        None if answer is None else vocabulary.followed(answer),
        {name: vocabulary.followed(schema or {"properties": {}}) for name, schema in called.items()},
        vocabulary.call_form,
        vocabulary.special,
        is_space_first=vocabulary.is_space_first,
    )
    return Constraint([vocabulary.matcher(text)])


def joined(constraints: Sequence[Constraint | None]) -> Constraint | None:
    """Make one logits processor for a batch of prompts, each with a constraint of its own, or with none."""
    if all(each is None for each in constraints):
        return None
    return Constraint([None if each is None else each.matchers[0] for each in constraints])


class Constraint(LogitsProcessor):
    """Lets every row go on only as its grammar does.

    Tokens are followed one by one or several at once, and taken back where they were only guessed, as by
    prompt lookup or a beam that was given up.

    Args:
        matchers: A grammar for each prompt, at its start; None for a prompt that goes on as it likes.
    """

    def __init__(self, matchers: Sequence[LLMatcher | None]) -> None:
        self.matchers = matchers
        self._prompt_width: int | None = None
        self._rows: dict[int, _Row] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, those of all other tokens at minus infinity; called at every step."""
        if self._prompt_width is None:
            self._prompt_width = input_ids.shape[1]
        num_rows, vocab_size = scores.shape
        allowed = np.ones((num_rows, vocab_size), dtype=np.bool_)
        for index, token_ids in enumerate(input_ids[:, self._prompt_width :].tolist()):
            prompt = index * len(self.matchers) // num_rows  # of which there may be several beams
            if (matcher := self.matchers[prompt]) is None:
                continue
            if index not in self._rows:
                self._rows[index] = _Row(matcher.deep_copy())
            self._rows[index].restrict(allowed[index], token_ids)
        # Where other processors rule out all that is allowed, such as an end that comes too early for them,
        # the grammar decides.
        possible = scores.clamp(min=torch.finfo(scores.dtype).min)
        return torch.where(torch.from_numpy(allowed).to(scores.device), possible, -torch.inf)


class _Row:
    """Where one row stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._followed: list[int] = []

    def restrict(self, allowed: NDArray[np.bool_], token_ids: Sequence[int]) -> None:
        """Mark which tokens may come after these."""
        if not self._follow(token_ids):
            return  # behind a guess that is wrong, and will be given up
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise InvalidInputError(
                f"the answer cannot be kept to its schema any further: {reason}; simplify the schema"
            )
        allowed[:] = np.unpackbits(mask, bitorder="little", count=len(allowed))

    def _follow(self, token_ids: Sequence[int]) -> bool:
        pairs = zip(self._followed, token_ids, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if num_wrong := len(self._followed) - num_shared:
            self._matcher.rollback(num_wrong)
        self._followed = list(token_ids[:num_shared])
        for token in token_ids[num_shared:]:
            if self._matcher.is_stopped():
                break  # what fills up a finished row
            if not self._matcher.try_consume_tokens([token]):
                return False
            self._followed.append(token)
        return True


class _Vocabulary:
    """The tokens of a tokenizer as llguidance knows them, and the grammars that were used with them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> None:
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "schemas and forced calls of tools need llguidance, which is not installed; "
                "run `pip install 'rag_blockcache[structured]'`"
            ) from error
        self._llguidance = llguidance
        ends = list(eos_token_ids) or None
        try:
            self._tokens: LLTokenizer = from_tokenizer(tokenizer, eos_token=ends)  # type: ignore[arg-type]
        except ValueError as error:
            raise InvalidInputError(
                f"schemas and forced calls of tools do not work with this tokenizer, a "
                f"{type(tokenizer).__name__} ({error}); use a fast one"
            ) from error
        added = tokenizer.added_tokens_decoder
        self.special = {token.content: index for index, token in added.items() if token.special}
        self.call_form = ChatTemplate(tokenizer).call_form
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids[:1])
        self.is_space_first = bool(first) and first[0].startswith("\u2581")
        self.matcher = lru_cache(maxsize=64)(self._compile)

    def followed(self, schema: Schema) -> Schema:
        """Return a schema in the form in which a grammar follows it."""
        return without_patterns(closed(schema), self._is_usable)

    def _compile(self, text: str) -> LLMatcher:
        matcher = self._llguidance.LLMatcher(self._tokens, text, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().partition("\n")[0]
            raise InvalidInputError(
                f"the schema of the answer or of a tool cannot be followed: {reason}; change it there"
            )
        for warning in matcher.get_grammar_warnings():
            logger.warning("a schema is followed in part only: %s", warning)
        return matcher

    def _is_usable(self, pattern: str) -> bool:
        text = self._llguidance.LLMatcher.grammar_from_regex(pattern)
        error = self._llguidance.LLMatcher.validate_grammar(text)
        if error:
            logger.warning("pattern %r of a schema cannot be followed, and is left out", pattern)
        return not error


_lock = threading.Lock()
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], _Vocabulary]] = WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> _Vocabulary:
    with _lock:
        made = _vocabularies.setdefault(tokenizer, {})
        if eos_token_ids not in made:
            made[eos_token_ids] = _Vocabulary(tokenizer, eos_token_ids)
        return made[eos_token_ids]


def _called(tools: Mapping[str, Schema], choice: str) -> Mapping[str, Schema]:
    """Return the tools that can be called."""
    if choice == "none":
        return {}
    if choice in ("auto", "required") and (tools or choice == "auto"):
        return tools
    if choice in tools:
        return {choice: tools[choice]}
    raise InvalidInputError(
        f"tool_choice is {choice!r}, but the tools are {sorted(tools)}; "
        "name one of them, or choose 'auto', 'none' or 'required'"
    )
