"""What the engine gives back: answers, streams of them, and reports on prefilling."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rag_blockcache.generator import Decoded
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.monitor import Monitor
from rag_blockcache.plan import Plan
from rag_blockcache.tool_calls import ToolCall


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: Without special tokens and calls of tools, cut at a stop string.
        token_ids: All new tokens, the end-of-sequence token included.
        finish_reason: ``stop``, ``length``, ``cancelled``, or ``tool_calls`` where tools are to be called.
        ttft_seconds: From the call to the first new token; the parts below add up to about that.
        match_seconds: Rendering, tokenizing, naming the blocks.
        load_seconds: Reading blocks from the store.
        encode_seconds: Encoding blocks that were not there.
        assemble_seconds: Re-encoding positions and placing.
        final_block_seconds: The pass over all computed slots.
        decode_tokens_per_second: After the first token; 0 if there was only one.
        num_hits: Passages found in the store; none where ``full`` was asked for, which looks none up.
        num_misses: Passages that were not, and were encoded and stored.
        num_reused_tokens: Prompt tokens whose keys and values were there already and were used as they are.
        num_computed_tokens: All other prompt tokens.
        num_stored_tokens: Tokens whose keys and values were computed now and are kept for other prompts.
        num_kept_tokens: Of the reused ones, those that the context of an earlier answer still held.
        tool_calls: Calls of the request's tools, in order.
        policy: The one that was used.
        policy_reason: Why, if it was not asked for by name.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    ttft_seconds: float
    match_seconds: float
    load_seconds: float
    encode_seconds: float
    assemble_seconds: float
    final_block_seconds: float
    decode_tokens_per_second: float
    num_hits: int
    num_misses: int
    num_reused_tokens: int
    num_computed_tokens: int
    policy: str
    policy_reason: str = ""
    num_stored_tokens: int = 0
    num_kept_tokens: int = 0
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.num_reused_tokens + self.num_computed_tokens


def finished(
    plan: Plan, decoded: Decoded, text: str, tool_calls: tuple[ToolCall, ...], monitor: Monitor
) -> Answer:
    """Put together the answer to a request that went through all stages."""
    first, last = monitor.first_token_time or plan.start, monitor.last_token_time or plan.start
    return Answer(
        text=text,
        token_ids=decoded.token_ids,
        finish_reason="tool_calls" if tool_calls else decoded.finish_reason,
        ttft_seconds=first - plan.start,
        match_seconds=plan.match_seconds,
        load_seconds=plan.load_seconds,
        encode_seconds=plan.encode_seconds,
        assemble_seconds=plan.assemble_seconds,
        final_block_seconds=plan.final_block_seconds,
        decode_tokens_per_second=(monitor.num_tokens - 1) / (last - first) if last > first else 0.0,
        num_hits=plan.num_hits,
        num_misses=plan.num_passages - plan.num_hits,
        num_reused_tokens=plan.num_reused,
        num_computed_tokens=plan.num_tokens - plan.num_reused,
        policy=plan.policy.name,
        policy_reason=plan.policy_reason,
        num_stored_tokens=plan.num_stored,
        num_kept_tokens=plan.num_kept,
        tool_calls=tool_calls,
    )


@dataclass(frozen=True)
class PrefillProgress:
    """How far a prefill has come.

    Attributes:
        num_done: Passages encoded or skipped so far.
        num_total: Passages in all; None if they come from an iterator of unknown length.
        num_tokens: Tokens encoded so far.
        num_bytes: Bytes of KV states written so far.
        seconds: Since the start.
    """

    num_done: int
    num_total: int | None
    num_tokens: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class PrefillReport:
    """What a prefill did.

    Attributes:
        num_passages: Passages given.
        num_encoded: Blocks computed and stored, which are there at the end.
        num_skipped: Passages whose block was stored already, or stood in the same call before.
        num_tokens: Tokens encoded.
        num_bytes: Bytes of KV states written.
        seconds: In all.
        num_not_stored: Blocks that the disk budget left no room for, at once or in the end; the same call
            with a larger budget stores them.
    """

    num_passages: int
    num_encoded: int
    num_skipped: int
    num_tokens: int
    num_bytes: int
    seconds: float
    num_not_stored: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens encoded a second."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class PrefillTally:
    """Counts what a prefill has done, and tells whoever listens."""

    def __init__(self, num_total: int | None, listener: Callable[[PrefillProgress], None] | None) -> None:
        self.num_done = 0
        self._num_total, self._listener = num_total, listener
        self._num_encoded = self._num_not_stored = self._num_tokens = self._num_bytes = 0
        self._start = time.perf_counter()

    def skip(self, num_passages: int) -> None:
        """Count passages that need no encoding."""
        self.num_done += num_passages
        self.tell()

    def leave_out(self, num_blocks: int) -> None:
        """Count blocks that are not stored for want of room."""
        self._num_not_stored += num_blocks
        self.skip(num_blocks)

    def lose(self, num_blocks: int) -> None:
        """Count blocks that were stored, and evicted for others of the same call."""
        self._num_encoded -= num_blocks
        self._num_not_stored += num_blocks

    def add(self, encoded: Iterable[BlockStates]) -> None:
        """Count blocks that were encoded and stored."""
        for states in encoded:
            self.num_done += 1
            self._num_encoded += 1
            self._num_tokens += states.num_tokens
            self._num_bytes += states.num_bytes
        self.tell()

    def tell(self) -> None:
        """Report how far it has come."""
        if self._listener is not None:
            seconds = time.perf_counter() - self._start
            self._listener(
                PrefillProgress(self.num_done, self._num_total, self._num_tokens, self._num_bytes, seconds)
            )

    def report(self) -> PrefillReport:
        """Return the whole count."""
        return PrefillReport(
            num_passages=self.num_done,
            num_encoded=self._num_encoded,
            num_skipped=self.num_done - self._num_encoded - self._num_not_stored,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            seconds=time.perf_counter() - self._start,
            num_not_stored=self._num_not_stored,
        )


@dataclass
class _Work:
    """What the thread behind a stream and its reader share; the thread must not hold the stream itself."""

    tokens: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    answer: Answer | None = None
    error: BaseException | None = None

    def run(self, make: Callable[[Monitor], Answer], monitor: Monitor) -> None:
        try:
            self.answer = make(monitor)
        except BaseException as error:  # whatever it is, the reader is who must see it
            self.error = error
        finally:
            self.tokens.put(None)

    def received(self) -> Iterator[int]:
        while (token := self.tokens.get()) is not None:
            yield token
        if self.error is not None:
            raise self.error


class AnswerStream(Iterator[str]):
    """Pieces of an answer, as they come.

    Closing it, leaving its ``with`` block, or losing the last reference to it, stops decoding after the
    current token.

    Args:
        run: Makes the answer; it is called in a thread of its own.
        pieces: Turns tokens into text.
    """

    def __init__(
        self, run: Callable[[Monitor], Answer], pieces: Callable[[Iterator[int]], Iterator[str]]
    ) -> None:
        self._work = _Work()
        self._monitor = Monitor(self._work.tokens.put)
        self._pieces = pieces(self._work.received())
        self._thread = threading.Thread(
            target=self._work.run, args=(run, self._monitor), daemon=True, name="rag-blockcache-answer"
        )
        self._thread.start()

    @property
    def answer(self) -> Answer | None:
        """The whole answer once all pieces were read, or what there is of it after ``close``; None before."""
        return self._work.answer

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._monitor.cancelled.set()

    def cancel(self) -> None:
        """Have decoding stop after the current token; does not wait for it."""
        self._monitor.cancelled.set()

    def close(self) -> None:
        """Stop decoding; what was generated so far is in ``answer``."""
        self.cancel()
        self._thread.join()
