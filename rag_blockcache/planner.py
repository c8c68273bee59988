"""Requests to plans: the prompt of a question, and which of its slots are placed and which computed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rag_blockcache.block_source import BlockSource
from rag_blockcache.errors import ContextTooLongError, InvalidInputError
from rag_blockcache.matcher import Matcher
from rag_blockcache.model import Model
from rag_blockcache.passages import Block, Excerpt, Passage, as_passages
from rag_blockcache.plan import Plan
from rag_blockcache.prompt import Prompt, Segment, Split
from rag_blockcache.request import Chat, Question, Request, Text
from rag_blockcache.reuse import FULL, choose_policy, parse_policy


class Planner:
    """Plans requests, and raises what is wrong with one before any work.

    Args:
        model: Sets the context window, and may rule reuse out for long prompts.
        prompt: Makes prompts.
        blocks: Names blocks.
        matcher: Finds known passages in chats and texts.
    """

    def __init__(self, model: Model, prompt: Prompt, blocks: BlockSource, matcher: Matcher) -> None:
        self._model, self._prompt, self._blocks, self._matcher = model, prompt, blocks, matcher

    def plan(
        self,
        request: Request,
        *,
        policy: str,
        max_new_tokens: int,
        start: float,
        continuation: Sequence[int] = (),
        beside: int = 0,
    ) -> Plan:
        """Plan one request.

        Args:
            request: What is asked.
            policy: Name of a policy, or ``auto``.
            max_new_tokens: Room that the answer needs in the context window.
            start: ``time.perf_counter()`` when the request came.
            continuation: Tokens behind the prompt that are computed with it.
            beside: Tokens of the longest prompt in the same batch.

        Raises:
            InvalidInputError: If request or policy cannot be used.
            ContextTooLongError: If prompt and answer exceed the context window.
        """
        segments = self.segments(request)
        if continuation:
            segments[-1] = Segment("text", (*segments[-1].token_ids, *continuation))
        total = sum(len(segment.token_ids) for segment in segments)
        if total + max_new_tokens > self._model.max_length:
            raise ContextTooLongError(
                f"the prompt has {total} tokens and the answer may have {max_new_tokens}, the context window "
                f"of the model is {self._model.max_length}; pass fewer or shorter passages, or a smaller "
                "max_new_tokens"
            )
        chosen, reason = parse_policy(policy), ""
        if chosen is None:
            chosen, reason = choose_policy(
                self._model.is_block_fine_tuned, can_be_observed=self._model.can_be_observed
            )
        regime = self._model.regime(max(total, beside))
        if regime is None and not chosen.is_full:
            chosen, reason = FULL, "the rotary frequencies of this model change with the length of the prompt"
        if chosen.query > 0 and not self._model.can_be_observed:
            raise InvalidInputError(
                f"policy {chosen.name!r} looks at the attention of the model, which "
                f"{type(self._model.network).__name__} computes in a way of its own "
                f"({self._model.config._attn_implementation!r}); use 'link-<k>' or 'blend-<share>'"
            )
        plan = Plan(segments, chosen, reason, regime or "", is_auto=policy == "auto", start=start)
        plan.num_continuation = len(continuation)
        plan.request = request
        plan.shares_preamble = isinstance(request, Question) and not request.chat_history
        if not chosen.is_full:
            plan.blocks = self._name_blocks(segments, plan.regime)
        plan.match_seconds = time.perf_counter() - start
        return plan

    def plan_batch(
        self, requests: Sequence[Request], *, policy: str, max_new_tokens: int, start: float
    ) -> list[Plan]:
        """Plan requests that are answered together; see ``plan``."""

        def plans(beside: int) -> list[Plan]:
            return [
                self.plan(request, policy=policy, max_new_tokens=max_new_tokens, start=start, beside=beside)
                for request in requests
            ]

        found = plans(0)
        if len({plan.regime for plan in found}) > 1:  # the model turns all rows by the angles of the longest
            found = plans(max(plan.num_tokens for plan in found))
        return found

    def segments(self, request: Request) -> list[Segment]:
        """Cut the prompt of a request; see ``Prompt.segments``."""
        if isinstance(request, Question):
            return self._prompt.segments(
                request.question,
                as_passages(request.passages),
                system_prompt=request.system_prompt,
                chat_history=request.chat_history,
                tools=request.tools,
            )
        if isinstance(request, Chat):
            return self._prompt.chat_segments(request, self._split(request))
        if isinstance(request, Text):
            return self._prompt.text_segments(request, self._split(request))
        raise InvalidInputError(
            f"a request is {type(request).__name__}; pass a Question, a Chat or a Text of rag_blockcache"
        )

    def _split(self, request: Chat | Text) -> Split:
        """Return what parts a text at the passages that are known or hinted at."""
        if isinstance(request.hints, str):
            raise InvalidInputError("hints must be a sequence of strings; wrap a single hint in a list")
        if not request.finds_passages:
            return lambda text: [text]
        hints = [*request.hints, *(passage.text for passage in as_passages(request.documents))]

        def split(text: str) -> list[str | Excerpt]:
            parts: list[str | Excerpt] = []
            end = 0
            for match in self._matcher.find(text, hints):
                parts += [text[end : match.start], Excerpt(text[match.start : match.stop], match.text)]
                end = match.stop
            return [*parts, text[end:]]

        return split

    def blocks(self, passages: Sequence[Passage]) -> list[Block]:
        """Return tokens and name of the block of each passage in an ordinary prompt."""
        preamble = self.usual_preamble()
        return [self._blocks.block(self._prompt.passage_tokens(each), preamble=preamble) for each in passages]

    def usual_preamble(self) -> tuple[int, ...]:
        """Return the tokens before the passages in a prompt without system prompt, history or tools."""
        return self._prompt.segments("?", [Passage("?")])[0].token_ids

    def _name_blocks(self, segments: Sequence[Segment], regime: str) -> dict[int, Block]:
        """Name what can be placed, by index of the segment: passages, and the preamble."""
        preamble = segments[0].token_ids
        named = {
            index: self._blocks.block(segment.block_tokens, preamble=preamble, regime=regime)
            for index, segment in enumerate(segments)
            if segment.kind == "passage" and len(segment.block_tokens) <= self._model.max_length
        }
        if preamble:
            named[0] = self._blocks.preamble_block(preamble, regime=regime)
        return named
