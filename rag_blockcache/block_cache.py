"""BlockCache, the public face: wires the stages together, and adds no ideas of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_blockcache.answers import (
    Answer,
    AnswerStream,
    PrefillProgress,
    PrefillReport,
    finished,
)
from rag_blockcache.assembler import Context
from rag_blockcache.async_answers import AsyncAnswerStream
from rag_blockcache.auto_policy import AutoPolicy
from rag_blockcache.block_source import Admission, BlockSource
from rag_blockcache.break_even import BreakEven
from rag_blockcache.conditioning import STAND_INS, default_sight, kind_of, sight_named
from rag_blockcache.device_tier import device_tier
from rag_blockcache.errors import InvalidInputError, OutOfSpaceError
from rag_blockcache.generation_options import check_options, setting, stop_strings
from rag_blockcache.generator import decode, prefill
from rag_blockcache.guard import THRESHOLD, GuardStatus, check_guard, start_guard, status_of
from rag_blockcache.kept_contexts import KeptContexts
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.loading import load_model
from rag_blockcache.matcher import Matcher
from rag_blockcache.monitor import Monitor
from rag_blockcache.passage_format import PassageFormat
from rag_blockcache.passage_registry import PassageRegistry
from rag_blockcache.passages import Block, Passage, as_passages
from rag_blockcache.plan import Plan
from rag_blockcache.planner import Planner
from rag_blockcache.policy_record import without_guard
from rag_blockcache.prefetcher import Prefetcher
from rag_blockcache.prefiller import prefill_passages
from rag_blockcache.prompt import Prompt
from rag_blockcache.quantization import codec_named
from rag_blockcache.repair import choose_tokens, expected_work
from rag_blockcache.request import Message, Question, Request
from rag_blockcache.response import constrained, read_response, response_pieces
from rag_blockcache.reuse import FULL, choose_policy
from rag_blockcache.self_check import check_reuse
from rag_blockcache.store import DiskStore, MemoryStore, TieredStore
from rag_blockcache.text_stream import no_pieces

logger = logging.getLogger(__name__)

_GROUP = 1024  # texts made known in one transaction


class BlockCache:
    """Answers questions over passages whose keys and values were computed before.

    Args:
        model: Hub id, local path, or a loaded causal language model of transformers (then ``tokenizer``
            is needed, and the model is used as it is).
        directory: Blocks are kept on disk in its folder ``blocks``; None keeps them in memory only.
        tokenizer: The model's own by default.
        device: For a model loaded by name: ``"cpu"``, ``"cuda"``, ``"auto"`` …; None takes a GPU if there is
            one.
        dtype: For a model loaded by name, such as ``"bfloat16"``; None keeps that of its files.
        adapter: A PEFT adapter for a model loaded by name.
        preamble: Text before the passages; None takes that of the passage format.
        passage_format: How passages are shown: ``"paper"``, ``"plain"``, ``"template"`` (the chat template's
            own ``documents``), or a ``PassageFormat``.
        blocks_see: What a block attends to beside itself: nothing, as in the paper (``"themselves"``); the
            ``"preamble"`` of its prompt, so that it serves prompts with that preamble alone; or
            ``"stand-ins"``, short texts in the place of other passages, the same for every prompt. None takes
            the paper's for a model that says it was block-fine-tuned, and stand-ins for any other, whose
            answers are closer to full attention with them.
        disk_budget_bytes: The least valuable blocks go when it is full. It is recorded in the directory; None
            keeps what is on record, which at first is no bound.
        memory_budget_bytes: Likewise for blocks held in memory; None sets no bound.
        device_budget_bytes: Likewise for blocks held on the GPU that the model is on, where those go that are
            used again. None takes a quarter of its memory that is free once the model is loaded, 0 keeps
            none. Without a GPU, or with a model spread over several devices, it changes nothing.
        context_budget_bytes: Likewise for contexts of the latest answers, kept where the model runs. A prompt
            that begins as one of them, such as the next turn of a chat, goes on from there, under policies
            that do not look at the question. 0 keeps none.
        salt: Blocks of one salt are invisible under another (one a tenant).
        admission: What becomes of a passage that an answer needs and nobody prefilled: ``"always"`` stores
            its block, ``"frequency"`` keeps it in memory and stores it at its second use, ``"off"`` drops it.
        codec: How blocks are kept: ``"none"`` exactly, ``"int8"`` in about half of the bytes, ``"int4"`` in
            less than a third; see docs/how-to/size-the-disk.md for what they lose.
        guard_rate: Share of answers that are also run with full attention, in the background, to see what
            reuse costs; see ``guard``. 0 runs none, and costs nothing.
        guard_threshold: Most divergence from full attention that is allowed, in nats a token; beyond it
            ``auto`` steps up to the next policy that computes more again.
        cuda_graphs: On an NVIDIA GPU with Triton, run short passes as CUDA graphs, and place, attend and
            norm with kernels of fewer launches; elsewhere it changes nothing. Answers differ by rounding.

    Raises:
        InvalidInputError: If an option has no such value.
        ModelNotFoundError: If the model cannot be found or loaded.
        UnsupportedModelError: If it cannot be served exactly; the message says why.
        StoreError: If the directory cannot be used.

    Example:
        >>> with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
        ...     report = cache.prefill(["Ada wrote the note."])
        ...     answer = cache.generate("Who wrote it?", ["Ada wrote the note."], max_new_tokens=4)
        >>> answer.num_hits, answer.num_misses
        (1, 0)
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        directory: str | Path | None,
        *,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        adapter: str | Path | None = None,
        preamble: str | None = None,
        passage_format: str | PassageFormat = "paper",
        blocks_see: str | None = None,
        disk_budget_bytes: int | None = None,
        memory_budget_bytes: int | None = 4 * 2**30,
        device_budget_bytes: int | None = None,
        context_budget_bytes: int = 2**30,
        salt: str = "",
        admission: Admission = "always",
        codec: str = "none",
        guard_rate: float = 0.0,
        guard_threshold: float = THRESHOLD,
        cuda_graphs: bool = True,
    ) -> None:
        form = codec_named(codec)  # a mistake shows before the model is loaded
        sight = sight_named(blocks_see)
        check_guard(guard_rate, guard_threshold)
        self.model = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype, adapter=adapter)
        self.model.cuda_graphs = cuda_graphs
        check_reuse(self.model)
        self.tokenizer = self.model.tokenizer
        self.codec = codec
        self.prompt = Prompt(self.tokenizer, passage_format, preamble)
        self.blocks_see = sight or default_sight(self.model.trained_sight)
        kind = kind_of(self.blocks_see)
        can_be_observed = self.model.can_be_observed
        shown = [asdict(self.prompt.format), self.prompt.preamble, kind, codec]
        self.auto_policy = AutoPolicy(
            directory,
            default=choose_policy(self.model.is_block_fine_tuned, can_be_observed=can_be_observed),
            model=str(self.model.network.name_or_path),
            fingerprint=self.model.fingerprint,
            prompt=hashlib.blake2b(json.dumps(shown).encode(), digest_size=16).hexdigest(),
            can_use=lambda policy: policy.query == 0 or can_be_observed,
        )
        self._guard_options = (guard_rate, guard_threshold)
        self._guard = start_guard(self.model, self.auto_policy, rate=guard_rate, threshold=guard_threshold)
        disk = None
        if directory is not None:  # after the model, so that nothing is made where something else is wrong
            disk = DiskStore(Path(directory) / "blocks", size_limit_bytes=disk_budget_bytes)
        device_store = device_tier(self.model, device_budget_bytes, context_budget_bytes=context_budget_bytes)
        self.store = TieredStore(MemoryStore(memory_budget_bytes), disk, device_store)
        named = json.dumps([self.model.fingerprint, salt, codec, *kind])
        self.fingerprint = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
        self._blocks = BlockSource(
            self.model,
            self.store,
            fingerprint=self.fingerprint,
            blocks_see=self.blocks_see,
            stand_ins=self.prompt.run_of_passages(STAND_INS),
            admission=admission,
            codec=form,
        )
        self._registry = PassageRegistry(directory)
        self._planner = Planner(self.model, self.prompt, self._blocks, Matcher(self._registry))
        self._break_even = BreakEven(self.model)
        self._kept = KeptContexts(self.model, context_budget_bytes)
        self._prefetcher = Prefetcher(self._planner, self.store)
        # Every prompt needs it; those of other system prompts come and go like passages.
        self.store.pin([self._blocks.preamble_block(self._planner.usual_preamble()).block_id])

    def __enter__(self) -> BlockCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still in flight, and let go of the store."""
        if self._guard is not None:
            self._guard.close()
        self._prefetcher.close()
        self._kept.clear()
        self.store.close()
        self._registry.close()

    # Naming

    def segments(
        self, request: str | Request, passages: Iterable[str | Passage] = (), **chat: Any
    ) -> list[list[int]]:
        """Return the token ids of a prompt, cut as they are computed: preamble, passages, final block.

        Args:
            request: What is asked; a question may come as a string.
            passages: With a string: texts to answer from.
            **chat: With a string: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.

        Returns:
            One list a segment; the first (preamble) may be empty. What stands between passages is a segment
            of its own.
        """
        cut = self._planner.segments(_request(request, passages, chat))
        return [list(segment.token_ids) for segment in cut]

    def block(self, passage: str | Passage) -> Block:
        """Return the tokens and the name of a passage's block; nothing is encoded."""
        return self._planner.blocks(as_passages([passage]))[0]

    def block_bytes(self, num_tokens: int) -> int:
        """Return what the states of a block of so many tokens take, in bytes."""
        return self._blocks.num_bytes(num_tokens)

    # Encoding

    def prefill(
        self,
        passages: Iterable[str | Passage],
        *,
        progress: Callable[[PrefillProgress], None] | None = None,
        evict: bool = True,
    ) -> PrefillReport:
        """Encode and store the blocks of passages; those that are stored already are skipped.

        Every batch is committed when it is done, so an interrupted call goes on where it was. What the whole
        disk budget has no room for is not encoded, so that a call does not only replace its own blocks.

        Args:
            passages: Any number of them; an iterator is read in groups.
            progress: Called after each batch.
            evict: Let blocks from before this call go where the disk budget is full; otherwise only what
                fits beside them is encoded.

        Raises:
            ContextTooLongError: If a passage does not fit the context window; what was stored by then stays.
            OutOfSpaceError: If the disk is full; what was stored stays.
        """
        if isinstance(passages, str | Passage):
            raise InvalidInputError("passages must be a sequence; wrap a single passage in a list")
        given = self._registered(passages)
        total = len(passages) if isinstance(passages, Sized) else None
        return prefill_passages(
            self._planner, self._blocks, given, num_total=total, progress=progress, evict=evict
        )

    def prefetch(self, passages: Iterable[str | Passage]) -> Future[int]:
        """Bring the blocks of passages from the disk into memory, in the background.

        A retriever names passages before a reranker is done with them, and before the prompt is written: time
        in which a disk can be read. ``PrefilledIndex.search`` does this for what it finds. What is not
        stored is passed over; nothing is encoded.

        Args:
            passages: Those that may be asked about next.

        Returns:
            A future of how many blocks came from the disk. Nobody needs to wait for it.
        """
        return self._prefetcher.prefetch(as_passages(passages))

    def register(self, passages: Iterable[str | Passage]) -> None:
        """Make texts known, so that they are found in prompts; nothing is encoded before they are.

        Args:
            passages: Texts as they stand in prompts; white space around them does not count. Those below 48
                bytes are passed over.
        """
        for _ in self._registered(passages):
            pass

    def forget(self, passages: Iterable[str | Passage]) -> None:
        """Delete the blocks of passages, and look for their texts no longer; unknown ones are passed over."""
        given = as_passages(passages)
        self._registry.remove(passage.text for passage in given)
        self._kept.clear()  # they may hold them
        for block in self._planner.blocks(given):
            self.store.pop(block.block_id, None)

    def _registered(self, passages: Iterable[str | Passage]) -> Iterator[Passage]:
        """Yield passages, once their texts are known, a group at a time."""
        remaining = iter(passages)
        while group := as_passages(islice(remaining, _GROUP)):
            self._registry.add(passage.text for passage in group)
            yield from group

    # Answering

    def answer(
        self, request: Request, *, max_new_tokens: int = 256, policy: str = "auto", **options: Any
    ) -> Answer:
        """Answer a question, a chat or a text, prefilling only what was never seen before.

        A passage whose block is stored is reused (a hit); any other is encoded first (a miss).

        Args:
            request: A ``Question`` over passages; a ``Chat`` or ``Text``, in which known passages are found.
            max_new_tokens: Decoding stops here or at the end-of-sequence token.
            policy: ``"block"`` reuses blocks as they are, ``"full"`` computes everything with full attention,
                ``"link-<k>"`` computes the first k tokens of each block again, ``"query-<share>"`` those that
                the question attends to most, ``"blend-<share>"`` those that deviate most; ``"+"`` joins them,
                ``"auto"`` chooses.
            **options: Everything else that transformers' ``generate()`` takes: sampling, ``stop_strings``,
                ``logits_processor``, ``stopping_criteria`` … An unknown option is an error.

        Raises:
            InvalidInputError: If an argument cannot be used.
            ContextTooLongError: If prompt and ``max_new_tokens`` exceed the context window. Nothing has been
                encoded or stored by then.

        Example:
            >>> from rag_blockcache import Text
            >>> with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
            ...     cache.register(["The lighthouse was built in 1854; its lamp burned whale oil."])
            ...     prompt = "Lamps: The lighthouse was built in 1854; its lamp burned whale oil. What oil?"
            ...     answer = cache.answer(Text(prompt), max_new_tokens=4)
            >>> answer.num_hits, answer.num_misses
            (0, 1)
        """
        return self.answer_batch([request], max_new_tokens=max_new_tokens, policy=policy, **options)[0]

    def stream_answer(
        self,
        request: Request,
        *,
        max_new_tokens: int = 256,
        policy: str = "auto",
        in_pieces: bool = True,
        **options: Any,
    ) -> AnswerStream:
        """Answer as ``answer`` does, piece by piece.

        Args:
            request: As for ``answer``.
            max_new_tokens: As for ``answer``.
            policy: As for ``answer``.
            in_pieces: Otherwise there are no pieces, only the ``answer`` at the end: for those who want to be
                able to stop, and nothing more.
            **options: As for ``answer``.

        Returns:
            An iterator over pieces of text; read to its end, it has the ``answer``. Closing it stops
            decoding. What is wrong with the request is raised here, before any work.
        """
        start = time.perf_counter()
        self._check_request(max_new_tokens, options)
        if in_pieces and (setting(self.model, options, "num_beams") or 1) > 1:
            raise InvalidInputError(
                "beam search cannot be streamed, its best beam is known at the end; use generate"
            )
        plan = self._planner.plan(request, policy=policy, max_new_tokens=max_new_tokens, start=start)
        chosen = constrained(self.model, [request], options)
        stops = stop_strings(self.model, options)
        return AnswerStream(
            lambda monitor: self._answer([plan], max_new_tokens, chosen, monitor)[0],
            lambda tokens: (
                response_pieces(self.model, request, tokens, stops) if in_pieces else no_pieces(tokens)
            ),
        )

    def answer_batch(
        self, requests: Sequence[Request], *, max_new_tokens: int = 256, policy: str = "auto", **options: Any
    ) -> list[Answer]:
        """Answer several requests together: their final blocks in one pass, their tokens in step.

        Args:
            requests: Of any kinds.
            max_new_tokens: For each answer.
            policy: As for ``answer``.
            **options: As for ``answer``.

        Returns:
            An answer a request, in their order; times to first token are those of the whole batch.
        """
        start = time.perf_counter()
        self._check_request(max_new_tokens, options)
        plans = self._planner.plan_batch(requests, policy=policy, max_new_tokens=max_new_tokens, start=start)
        chosen = constrained(self.model, requests, options)
        return self._answer(plans, max_new_tokens, chosen, Monitor()) if plans else []

    async def aanswer(self, request: Request, **options: Any) -> Answer:
        """Answer as ``answer`` does, without keeping the event loop; cancelling the task stops decoding."""
        return await self.astream_answer(request, in_pieces=False, **options).whole()

    def astream_answer(self, request: Request, **options: Any) -> AsyncAnswerStream:
        """Answer piece by piece, without keeping the event loop.

        Returns:
            What ``stream_answer`` does, for ``async for``; what is wrong with the request is raised by the
            first piece.
        """
        return AsyncAnswerStream(lambda: self.stream_answer(request, **options))

    def generate(
        self,
        question: str,
        passages: Iterable[str | Passage],
        *,
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from passages: ``answer`` for a ``Question`` of these arguments."""
        request = Question(question, as_passages(passages), system_prompt, chat_history, tools)
        return self.answer(request, **options)

    def stream(
        self,
        question: str,
        passages: Iterable[str | Passage],
        *,
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer a question piece by piece: ``stream_answer`` for a ``Question`` of these arguments."""
        request = Question(question, as_passages(passages), system_prompt, chat_history, tools)
        return self.stream_answer(request, **options)

    def generate_batch(
        self, requests: Sequence[tuple[str, Iterable[str | Passage]]], **options: Any
    ) -> list[Answer]:
        """Answer several questions, each with its passages: ``answer_batch`` for a ``Question`` each."""
        questions = [Question(question, as_passages(passages)) for question, passages in requests]
        return self.answer_batch(questions, **options)

    def first_logits(
        self,
        request: str | Request,
        passages: Iterable[str | Passage] = (),
        *,
        policy: str = "auto",
        **chat: Any,
    ) -> Tensor:
        """Return the logits of the first new token, ``(vocab_size,)``, float32, on the CPU.

        Args:
            request: What is asked; a question may come as a string.
            passages: With a string: texts to answer from.
            policy: As for ``answer``.
            **chat: With a string: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.
        """
        plan = self._planner.plan(
            _request(request, passages, chat), policy=policy, max_new_tokens=0, start=time.perf_counter()
        )
        return self._prefill([plan])[1][0, -1].float().cpu()

    def score(
        self,
        request: str | Request,
        passages: Iterable[str | Passage],
        continuation: str | Sequence[int],
        *,
        policy: str = "auto",
        **chat: Any,
    ) -> Tensor:
        """Return the log-probability of each token of a given answer.

        Args:
            request: What is asked; a question may come as a string.
            passages: With a string: texts to answer from; otherwise empty.
            continuation: Text, or token ids, that would follow the prompt.
            policy: As for ``answer``.
            **chat: With a string: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.

        Returns:
            ``(num_tokens,)``, float32, on the CPU; natural logarithms.
        """
        token_ids = (
            self.prompt.text_tokens(continuation) if isinstance(continuation, str) else tuple(continuation)
        )
        if not token_ids:
            raise InvalidInputError("the continuation is empty; give a text or token ids to score")
        plan = self._planner.plan(
            _request(request, passages, chat),
            policy=policy,
            max_new_tokens=0,
            start=time.perf_counter(),
            continuation=token_ids[:-1],
        )
        logits = self._prefill([plan], num_logits=len(token_ids))[1][0]
        log_probabilities = logits.float().log_softmax(dim=-1).cpu()
        return log_probabilities.gather(1, torch.tensor(token_ids)[:, None])[:, 0]

    # What reuse costs in answers

    @property
    def guard(self) -> GuardStatus:
        """What the guard found, and what ``auto`` stands for now."""
        if self._guard is None:
            return status_of(self.auto_policy, *self._guard_options)
        return self._guard.status()

    def reset_guard(self) -> None:
        """Forget what the guard found, in the directory too: ``auto`` begins anew."""
        self.auto_policy.update(without_guard)

    # The stages of a request

    def _load(self, plan: Plan) -> dict[str, BlockStates]:
        """Return the states that a plan places."""
        self.auto_policy.apply(plan)
        if plan.policy.is_full:
            return {}
        states = self._blocks.load(plan)
        # A block that is missing is worth its encoding: it may stand in the next, longer prompt.
        has_all = len(plan.found) == len({block.block_id for block in plan.blocks.values()})
        if plan.is_auto and has_all and not self._pays(plan):
            plan.policy, plan.policy_reason = FULL, "so few tokens are computed sooner than reused"
            return {}
        return states | self._blocks.encode_missing(plan)

    def _pays(self, plan: Plan) -> bool:
        """Return whether what a plan reuses is sooner than computing everything."""
        num_chosen, num_looked = expected_work(self.model, plan)
        num_reused = plan.num_placed - num_chosen
        return self._break_even.pays(num_reused, plan.num_tokens - num_reused, num_looked)

    def _prefill(
        self, plans: Sequence[Plan], *, room: int = 0, num_logits: int = 1, continues: bool = False
    ) -> tuple[Context, Tensor, list[dict[str, BlockStates]]]:
        """Load, assemble and prefill; on demand from the context of an earlier answer that begins alike.

        Returns:
            The context, logits ``(batch, num_logits, vocab_size)``, and the states that each plan placed.
        """
        states = [self._load(plan) for plan in plans]
        start = time.perf_counter()
        lengths = [plan.num_tokens for plan in plans]
        context = self._kept.take(plans[0], room) if continues and len(plans) == 1 else None
        if context is None:
            context = Context(self.model, lengths, room=room, scratch=int(len(plans) > 1))
        for row, (plan, loaded) in enumerate(zip(plans, states, strict=True)):
            context.place(row, plan.placements(loaded), max(lengths))
        assembled = time.perf_counter()
        choose_tokens(self.model, context, plans)
        logits = prefill(self.model, context, [plan.computed() for plan in plans], num_logits=num_logits)
        for plan in plans:
            plan.assemble_seconds = assembled - start
            plan.final_block_seconds = time.perf_counter() - assembled
        return context, logits, states

    def _answer(
        self, plans: Sequence[Plan], max_new_tokens: int, options: Mapping[str, Any], monitor: Monitor
    ) -> list[Answer]:
        if self._guard is None:
            return self._answer_now(plans, max_new_tokens, options, monitor)
        with self._guard.answering():
            answers = self._answer_now(plans, max_new_tokens, options, monitor)
        for plan, answer in zip(plans, answers, strict=True):
            self._guard.sample(plan, answer.token_ids, answer.finish_reason, self._prefill)
        return answers

    def _answer_now(
        self, plans: Sequence[Plan], max_new_tokens: int, options: Mapping[str, Any], monitor: Monitor
    ) -> list[Answer]:
        context, logits, states = self._prefill(plans, room=max_new_tokens, continues=True)
        decoded = decode(
            self.model,
            context,
            [plan.token_ids for plan in plans],
            logits,
            max_new_tokens=max_new_tokens,
            monitor=monitor,
            options=options,
        )
        if len(plans) == 1:
            self._kept.keep(plans[0], context, decoded[0].token_ids)
        for plan, placed in zip(plans, states, strict=True):
            self._learn(plan, placed)
        stops = stop_strings(self.model, options)
        return [
            finished(plan, row, *read_response(self.model, plan.request, row.token_ids, stops), monitor)
            for plan, row in zip(plans, decoded, strict=True)
        ]

    def _learn(self, plan: Plan, states: Mapping[str, BlockStates]) -> None:
        """Keep for later prompts what a request brought, now that nobody waits for its first token."""
        self._blocks.promote(plan, states)
        if self._blocks.admission != "off" and (texts := plan.new_texts()):
            try:
                self._registry.add(texts)
            except OutOfSpaceError as error:
                logger.warning("%d texts were not made known: %s", len(texts), error)

    def _check_request(self, max_new_tokens: int, options: Mapping[str, Any]) -> None:
        """Raise what is wrong with the options of a request before any work."""
        if max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
        check_options(options)
        stop_strings(self.model, options)


def _request(request: str | Request, passages: Iterable[str | Passage], chat: Mapping[str, Any]) -> Request:
    """Make a question of a string; a request is complete already."""
    if isinstance(request, str):
        return Question(request, as_passages(passages), **chat)
    if chat or list(passages):
        raise InvalidInputError("a request holds its passages, history and tools itself; give them there")
    return request
