"""BlockCache, the public face: wires the stages together, and adds no ideas of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_blockcache.answers import Answer, AnswerStream, PrefillProgress, PrefillReport, PrefillTally
from rag_blockcache.assembler import Context, Placement
from rag_blockcache.break_even import BreakEven
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import (
    ContextTooLongError,
    InvalidInputError,
    OutOfSpaceError,
    UnsupportedModelError,
)
from rag_blockcache.generator import (
    Computed,
    Decoded,
    Monitor,
    check_options,
    cut_at_stop,
    decode,
    prefill,
    text_pieces,
)
from rag_blockcache.kv_states import KVStates
from rag_blockcache.model import load_model
from rag_blockcache.passages import Block, Passage, as_passages, block_id
from rag_blockcache.plan import Plan
from rag_blockcache.prompt import Message, PassageFormat, Prompt, Segment
from rag_blockcache.reuse import choose_policy, parse_policy
from rag_blockcache.store import DiskStore, MemoryStore, TieredStore

logger = logging.getLogger(__name__)

_GROUP = 1024  # passages whose tokens are looked at together, so that rows of a batch are alike in length
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


class BlockCache:
    """Answers questions over passages whose keys and values were computed before.

    Args:
        model: Hub id, local path, or a loaded causal language model of transformers (then ``tokenizer``
            is needed, and the model is used as it is).
        directory: Where blocks are kept on disk, in its folder ``blocks``; None keeps them in memory only.
        tokenizer: The model's own by default.
        device: For a model loaded by name: ``"cpu"``, ``"cuda"``, ``"auto"`` …; None takes a GPU if there is one.
        dtype: For a model loaded by name, such as ``"bfloat16"``; None keeps that of its files.
        adapter: A PEFT adapter for a model loaded by name.
        preamble: Text before the passages; None takes that of the passage format.
        passage_format: How passages are shown: ``"paper"``, ``"plain"``, ``"template"`` (the chat template's
            own ``documents``), or a ``PassageFormat``.
        condition_on_preamble: Let each block also attend to the preamble, which is better on models that
            were not block-fine-tuned, and a departure from the paper's mask.
        disk_budget_bytes: The least valuable blocks go when it is full; None sets no bound.
        memory_budget_bytes: Likewise for blocks held in memory.
        salt: Blocks of one salt are invisible under another (one a tenant).

    Raises:
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
        condition_on_preamble: bool = False,
        disk_budget_bytes: int | None = None,
        memory_budget_bytes: int | None = 4 * 2**30,
        salt: str = "",
    ) -> None:
        memory = MemoryStore(memory_budget_bytes)
        disk = (
            None
            if directory is None
            else DiskStore(Path(directory) / "blocks", size_limit_bytes=disk_budget_bytes)
        )
        self.store = TieredStore(memory, disk)
        self.model = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype, adapter=adapter)
        self.tokenizer = self.model.tokenizer
        self.prompt = Prompt(self.tokenizer, passage_format, preamble)
        self.condition_on_preamble = condition_on_preamble
        self.fingerprint = hashlib.blake2b(
            json.dumps([self.model.fingerprint, salt]).encode(), digest_size=16
        ).hexdigest()
        self._break_even = BreakEven(self.model)
        self._check_reuse()

    def __enter__(self) -> BlockCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still in flight, and let go of the store."""
        self.store.close()

    # Naming

    def segments(self, question: str, passages: Iterable[str | Passage], **chat: Any) -> list[list[int]]:
        """Return the token ids of a prompt, cut as they are computed: preamble, passages, final block.

        Args:
            question: What to answer.
            passages: Texts to answer from; may be empty.
            **chat: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.

        Returns:
            One list a segment; the first (preamble) may be empty. Only the ``template`` format puts
            segments between passages, where the chat template writes something there.
        """
        return [list(segment.token_ids) for segment in self._segments(question, passages, chat)]

    def block(self, passage: str | Passage) -> Block:
        """Return the tokens and the name of a passage's block; nothing is encoded."""
        return self._block(self.prompt.passage_tokens(as_passages([passage])[0]), self._usual_preamble(), "")

    # Encoding

    def prefill(
        self,
        passages: Iterable[str | Passage],
        *,
        progress: Callable[[PrefillProgress], None] | None = None,
    ) -> PrefillReport:
        """Encode and store the blocks of passages; those that are stored already are skipped.

        Every batch is committed when it is done, so an interrupted call goes on where it was.

        Args:
            passages: Any number of them; an iterator is read in groups.
            progress: Called after each batch.

        Raises:
            ContextTooLongError: If a passage does not fit the context window; blocks before it are stored.
            OutOfSpaceError: If the disk is full; what was stored stays.
        """
        if isinstance(passages, str | Passage):
            raise InvalidInputError("passages must be a sequence; wrap a single passage in a list")
        tally = PrefillTally(len(passages) if isinstance(passages, Sequence) else None, progress)
        remaining = iter(passages)
        while group := as_passages(islice(remaining, _GROUP)):
            self._prefill_group(group, tally)
        return tally.report()

    def _prefill_group(self, group: Sequence[Passage], tally: PrefillTally) -> None:
        missing: dict[str, Block] = {}
        for passage in group:
            block = self.block(passage)
            if len(block.token_ids) > self.model.max_length:
                raise ContextTooLongError(
                    f"passage {tally.num_done} has {len(block.token_ids)} tokens, the context window of the model "
                    f"is {self.model.max_length}; split it into shorter passages"
                )
            tally.num_done += 1
            if block.block_id not in missing and block.block_id not in self.store:
                missing[block.block_id] = block
        tally.num_done -= len(missing)
        for batch, seconds in self._encode(list(missing.values()), self._usual_preamble(), ""):
            self.store.put_many(batch, cost_seconds=seconds)
            tally.add(batch.values())
        tally.tell()

    def _encode(
        self, blocks: Sequence[Block], preamble: Sequence[int], regime: str
    ) -> Iterator[tuple[dict[str, KVStates], float]]:
        """Yield the states of blocks a batch at a time, with the seconds that each batch took."""
        before = None
        if self.condition_on_preamble and preamble and blocks:
            before = self._preamble_states(preamble, regime)
        start = time.perf_counter()
        token_ids = [block.token_ids for block in blocks]
        for batch in encode_blocks(self.model, token_ids, conditioned_on=before, regime=regime):
            states = {blocks[index].block_id: states for index, states in batch}
            yield states, time.perf_counter() - start
            start = time.perf_counter()

    # Answering

    def generate(
        self,
        question: str,
        passages: Iterable[str | Passage],
        *,
        max_new_tokens: int = 256,
        policy: str = "auto",
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from passages, prefilling only what was never seen before.

        A passage whose block is stored is reused (a hit); any other is encoded and stored first (a miss).

        Args:
            question: Without a chat template; the tokenizer's is applied.
            passages: Texts to answer from, in the order in which the model reads them; may be empty.
            max_new_tokens: Decoding stops here or at the end-of-sequence token.
            policy: ``"block"`` reuses blocks as they are, ``"full"`` computes everything with full attention,
                ``"link-<k>"`` computes the first k tokens of each block again, ``"auto"`` chooses.
            system_prompt: Goes where the chat template has it.
            chat_history: Earlier messages, ``{"role": ..., "content": ...}`` each.
            tools: Handed to the chat template.
            **options: Everything else that transformers' ``generate()`` takes: sampling, ``stop_strings``,
                ``logits_processor``, ``stopping_criteria`` … An unknown option is an error.

        Raises:
            InvalidInputError: If an argument cannot be used.
            ContextTooLongError: If prompt and ``max_new_tokens`` exceed the context window. Nothing has been
                encoded or stored by then.
        """
        start = time.perf_counter()
        chat = {"system_prompt": system_prompt, "chat_history": chat_history, "tools": tools}
        plan = self._plan(question, passages, policy, chat, max_new_tokens, options, start)
        return self._answer([plan], max_new_tokens, options, Monitor())[0]

    def stream(
        self,
        question: str,
        passages: Iterable[str | Passage],
        *,
        max_new_tokens: int = 256,
        policy: str = "auto",
        system_prompt: str | None = None,
        chat_history: Sequence[Message] = (),
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> AnswerStream:
        """Answer as ``generate`` does, piece by piece.

        Returns:
            An iterator over pieces of text; read to its end, it has the ``answer``. Closing it stops decoding.
        """
        start = time.perf_counter()
        if options.get("num_beams", 1) != 1:
            raise InvalidInputError(
                "beam search cannot be streamed, its best beam is known at the end; use generate"
            )
        chat = {"system_prompt": system_prompt, "chat_history": chat_history, "tools": tools}
        plan = self._plan(question, passages, policy, chat, max_new_tokens, options, start)
        stops = _stop_strings(options)
        return AnswerStream(
            lambda monitor: self._answer([plan], max_new_tokens, options, monitor)[0],
            lambda tokens: text_pieces(self.model, tokens, stops),
        )

    def generate_batch(
        self,
        requests: Sequence[tuple[str, Iterable[str | Passage]]],
        *,
        max_new_tokens: int = 256,
        policy: str = "auto",
        **options: Any,
    ) -> list[Answer]:
        """Answer several questions together: their final blocks in one pass, their tokens in step.

        Args:
            requests: A question and its passages each.
            max_new_tokens: For each answer.
            policy: As for ``generate``.
            **options: As for ``generate``.

        Returns:
            An answer a request, in their order; times to first token are those of the whole batch.
        """
        start = time.perf_counter()
        plans = [
            self._plan(question, passages, policy, {}, max_new_tokens, options, start)
            for question, passages in requests
        ]
        return self._answer(plans, max_new_tokens, options, Monitor()) if plans else []

    def first_logits(
        self, question: str, passages: Iterable[str | Passage], *, policy: str = "auto", **chat: Any
    ) -> Tensor:
        """Return the logits of the first new token, ``(vocab_size,)``, float32, on the CPU.

        Args:
            question: As for ``generate``.
            passages: As for ``generate``.
            policy: As for ``generate``.
            **chat: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.
        """
        plan = self._plan(question, passages, policy, chat, 0, {}, time.perf_counter())
        return self._first_logits([plan], room=0)[1][0, -1].float().cpu()

    def score(
        self,
        question: str,
        passages: Iterable[str | Passage],
        continuation: str | Sequence[int],
        *,
        policy: str = "auto",
        **chat: Any,
    ) -> Tensor:
        """Return the log-probability of each token of a given answer.

        Args:
            question: As for ``generate``.
            passages: As for ``generate``.
            continuation: Text, or token ids, that would follow the prompt.
            policy: As for ``generate``.
            **chat: ``system_prompt``, ``chat_history`` and ``tools``, as for ``generate``.

        Returns:
            ``(num_tokens,)``, float32, on the CPU; natural logarithms.
        """
        token_ids = (
            self.prompt.text_tokens(continuation) if isinstance(continuation, str) else tuple(continuation)
        )
        if not token_ids:
            raise InvalidInputError("the continuation is empty; give a text or token ids to score")
        plan = self._plan(question, passages, policy, chat, 0, {}, time.perf_counter(), token_ids[:-1])
        logits = self._first_logits([plan], room=0, num_logits=len(token_ids))[1][0]
        log_probabilities = logits.float().log_softmax(dim=-1).cpu()
        return log_probabilities.gather(1, torch.tensor(token_ids)[:, None])[:, 0]

    # The stages of a request

    def _segments(
        self, question: str, passages: Iterable[str | Passage], chat: Mapping[str, Any]
    ) -> list[Segment]:
        return self.prompt.segments(question, as_passages(passages), **chat)

    def _plan(
        self,
        question: str,
        passages: Iterable[str | Passage],
        policy: str,
        chat: Mapping[str, Any],
        max_new_tokens: int,
        options: Mapping[str, Any],
        start: float,
        continuation: Sequence[int] = (),
    ) -> Plan:
        check_options(options)
        segments = self._segments(question, passages, chat)
        if continuation:
            segments[-1] = Segment("text", (*segments[-1].token_ids, *continuation))
        total = sum(len(segment.token_ids) for segment in segments)
        if total + max_new_tokens > self.model.max_length:
            raise ContextTooLongError(
                f"the prompt has {total} tokens and the answer may have {max_new_tokens}, the context window of the "
                f"model is {self.model.max_length}; pass fewer or shorter passages, or a smaller max_new_tokens"
            )
        chosen, reason = (
            choose_policy(self.model.is_block_fine_tuned) if policy == "auto" else (parse_policy(policy), "")
        )
        regime = self.model.regime(total)
        if regime is None and not chosen.is_full:
            chosen, reason = (
                parse_policy("full"),
                "the rotary frequencies of this model depend on the prompt's length",
            )
        plan = Plan(segments, chosen, reason, regime or "", is_auto=policy == "auto", start=start)
        if not chosen.is_full:
            preamble = segments[0].token_ids
            plan.keeps_preamble = not chat.get("chat_history")
            for index, segment in enumerate(segments):
                if segment.kind == "passage":
                    plan.blocks[index] = self._block(segment.token_ids, preamble, plan.regime)
                elif index == 0 and segment.token_ids:
                    plan.blocks[index] = self._block(segment.token_ids, (), plan.regime)
        plan.match_seconds = time.perf_counter() - start
        return plan

    def _load(self, plan: Plan) -> dict[str, KVStates]:
        """Return the states of a plan's blocks, from the store or encoded now."""
        start = time.perf_counter()
        names = {block.block_id: block for block in plan.blocks.values()}
        states = self.store.get_many(list(names))
        plan.found = frozenset(states)
        plan.load_seconds = time.perf_counter() - start
        if plan.is_auto and not self._break_even.pays(plan.num_reused):
            plan.policy, plan.policy_reason = (
                parse_policy("full"),
                "so few tokens are computed sooner than reused",
            )
            return {}
        start = time.perf_counter()
        states |= self._encode_missing(
            plan, {name: block for name, block in names.items() if name not in states}
        )
        plan.encode_seconds = time.perf_counter() - start
        return states

    def _encode_missing(self, plan: Plan, missing: dict[str, Block]) -> dict[str, KVStates]:
        encoded: dict[str, KVStates] = {}
        preamble = plan.segments[0].token_ids
        first = plan.blocks.get(0)
        if first is not None and missing.pop(first.block_id, None) is not None:
            encoded[first.block_id] = self._preamble_states(preamble, plan.regime, keep=plan.keeps_preamble)
        for batch, seconds in self._encode(list(missing.values()), preamble, plan.regime):
            encoded |= batch
            self._keep(batch, seconds)
        return encoded

    def _preamble_states(self, preamble: Sequence[int], regime: str, *, keep: bool = True) -> KVStates:
        name = self._block(preamble, (), regime).block_id
        states = self.store.get(name)
        if states is None:
            start = time.perf_counter()
            [[(_, states)]] = encode_blocks(self.model, [preamble], regime=regime)
            if keep:
                self._keep({name: states}, time.perf_counter() - start)
                self.store.pin([name])
        return states

    def _keep(self, states: Mapping[str, KVStates], seconds: float) -> None:
        """Store blocks that an answer needed; a full disk must not cost the answer."""
        try:
            self.store.put_many(states, cost_seconds=seconds)
        except OutOfSpaceError as error:
            logger.warning("answering goes on, but %d blocks were not stored: %s", len(states), error)

    def _first_logits(
        self, plans: Sequence[Plan], *, room: int, num_logits: int = 1
    ) -> tuple[Context, Tensor]:
        """Load, assemble and prefill; return the context and the logits ``(batch, num_logits, vocab_size)``."""
        states = [{} if plan.policy.is_full else self._load(plan) for plan in plans]
        start = time.perf_counter()
        scratch = 0 if len(plans) == 1 else 1
        context = Context(self.model, [plan.num_tokens for plan in plans], room=room, scratch=scratch)
        for row, (plan, loaded) in enumerate(zip(plans, states, strict=True)):
            context.place(row, plan.placements(loaded), plan.num_tokens)
        assembled = time.perf_counter()
        logits = prefill(self.model, context, [plan.computed() for plan in plans], num_logits=num_logits)
        for plan in plans:
            plan.assemble_seconds, plan.final_block_seconds = (
                assembled - start,
                time.perf_counter() - assembled,
            )
        return context, logits

    def _answer(
        self, plans: Sequence[Plan], max_new_tokens: int, options: Mapping[str, Any], monitor: Monitor
    ) -> list[Answer]:
        if max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
        context, logits = self._first_logits(plans, room=max_new_tokens)
        decoded = decode(
            self.model,
            context,
            [plan.token_ids for plan in plans],
            logits,
            max_new_tokens=max_new_tokens,
            monitor=monitor,
            options=options,
        )
        stops = _stop_strings(options)
        return [self._finish(plan, row, monitor, stops) for plan, row in zip(plans, decoded, strict=True)]

    def _finish(self, plan: Plan, decoded: Decoded, monitor: Monitor, stops: Sequence[str]) -> Answer:
        first, last = monitor.first_token_time or plan.start, monitor.last_token_time or plan.start
        text = self.tokenizer.decode(decoded.token_ids, skip_special_tokens=True)
        passages = [
            block.block_id for index, block in plan.blocks.items() if plan.segments[index].kind == "passage"
        ]
        num_hits = sum(name in plan.found for name in passages)
        num_reused = 0 if plan.policy.is_full else plan.num_reused
        return Answer(
            text=cut_at_stop(text, stops),
            token_ids=decoded.token_ids,
            finish_reason=decoded.finish_reason,
            ttft_seconds=first - plan.start,
            match_seconds=plan.match_seconds,
            load_seconds=plan.load_seconds,
            encode_seconds=plan.encode_seconds,
            assemble_seconds=plan.assemble_seconds,
            final_block_seconds=plan.final_block_seconds,
            decode_tokens_per_second=(monitor.num_tokens - 1) / (last - first) if last > first else 0.0,
            num_hits=num_hits,
            num_misses=len(passages) - num_hits,
            num_reused_tokens=num_reused,
            num_computed_tokens=plan.num_tokens - num_reused,
            policy=plan.policy.name,
            policy_reason=plan.policy_reason,
        )

    def _block(self, token_ids: Sequence[int], preamble: Sequence[int], regime: str) -> Block:
        seen = preamble if self.condition_on_preamble else ()
        named = f"{self.fingerprint}/{regime}"
        return Block(tuple(token_ids), block_id(token_ids, fingerprint=named, conditioned_on=seen))

    def _usual_preamble(self) -> tuple[int, ...]:
        """Return the tokens before the passages in a prompt without system prompt, history or tools."""
        if not self.condition_on_preamble:
            return ()
        return self.prompt.segments("?", [Passage("?")])[0].token_ids

    def _check_reuse(self) -> None:
        """Compare reuse with the model's own forward pass where both must agree: one block at the start.

        A block at the start, and a final block that sees all of it, is plain causal attention. A model that
        ignores positions, masks or the cache it is given shows here, whatever its architecture.

        Raises:
            UnsupportedModelError: If they differ.
        """
        token_ids = (torch.arange(24) * 7919 + 13) % self.model.config.vocab_size
        token_ids = token_ids[: self.model.max_length]
        cut = len(token_ids) // 2
        logits = []
        for reused in (0, cut):
            context = Context(self.model, [len(token_ids)])
            if reused:
                [[(_, states)]] = encode_blocks(self.model, [token_ids[:reused].tolist()])
                context.place(0, [Placement(states, 0)], len(token_ids))
            computed = Computed(torch.arange(reused, len(token_ids)), token_ids[reused:])
            logits.append(prefill(self.model, context, [computed])[0, -1].float())
        difference = float((logits[1] - logits[0]).norm() / logits[0].norm())
        allowed = _TOLERANCE.get(self.model.dtype, 0.05)
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"{type(self.model.network).__name__} gives other logits over reused states than on its own "
                f"(relative difference {difference:.2g}, {allowed:.2g} is allowed); it cannot be served exactly"
            )


def _stop_strings(options: Mapping[str, Any]) -> list[str]:
    stops = options.get("stop_strings") or []
    return [stops] if isinstance(stops, str) else list(stops)
