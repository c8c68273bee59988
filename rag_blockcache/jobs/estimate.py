"""What prefilling a corpus will cost and bring, before any of it is done.

Documents are read and split as the job would do it. Speed comes from a few passages of the corpus, encoded
and answered from with this model on this machine; longer prompts are extended from there in a straight line,
which leaves out that attention grows faster: the time that reuse saves is more than this says, not less.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.index_records import PassageRecord
from rag_blockcache.jobs.documents import PassageSplitter, read_documents, split_document
from rag_blockcache.jobs.index_report import Failure, JobTally
from rag_blockcache.jobs.indexing import named_passage
from rag_blockcache.jobs.progress import ProgressCallback
from rag_blockcache.passages import Passage

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache

_SAMPLE_TOKENS = 1024  # enough to fill a batch, few enough to take seconds on a CPU
_QUESTION = "What does this passage say, and which of the others agree with it?"
_SHOWN = 3  # reasons in an error
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Speed:
    """How fast a model is here.

    Attributes:
        tokens_per_second: Encoding passages.
        full_seconds_per_token: Prefilling a prompt in full.
        reuse_seconds_per_token: Placing stored tokens, from memory.
        question_seconds: The pass over the question alone.
        is_measured: Whether this was measured, or follows from a given rate.
    """

    tokens_per_second: float
    full_seconds_per_token: float
    reuse_seconds_per_token: float
    question_seconds: float
    is_measured: bool


@dataclass(frozen=True)
class Estimate:
    """What a corpus takes and gives.

    Attributes:
        num_documents: Documents that can be read.
        num_failed_documents: Documents that cannot be used, in whole or in part.
        num_passages: Passages, each counted once however many documents hold it.
        num_tokens: Their tokens.
        num_bytes: Size of their KV states on disk.
        free_bytes: Space free where the index is to lie; None if no directory was named.
        fits: Whether ``num_bytes`` fit there; None likewise.
        prefill_hours: Time to encode all of it.
        passages_per_question: How many passages a prompt is taken to hold.
        full_ttft_seconds: Time to first token without reuse.
        reuse_ttft_seconds: Time to first token with all passages reused, from memory.
        break_even_uses: How often a passage must be retrieved before its prefill has paid for itself;
            None if it never does.
        break_even_bytes_per_second: What the disk must deliver for loading to be sooner than computing;
            None if nothing is saved anyway.
        break_even_reads_per_second: The same in passages of average length.
        speed: What times were taken from.
        failures: Documents and passages that cannot be used.
    """

    num_documents: int
    num_failed_documents: int
    num_passages: int
    num_tokens: int
    num_bytes: int
    free_bytes: int | None
    fits: bool | None
    prefill_hours: float
    passages_per_question: int
    full_ttft_seconds: float
    reuse_ttft_seconds: float
    break_even_uses: int | None
    break_even_bytes_per_second: float | None
    break_even_reads_per_second: float | None
    speed: Speed
    failures: tuple[Failure, ...]


def estimate(
    paths: Sequence[Path | str],
    *,
    cache: BlockCache,
    splitter: PassageSplitter,
    directory: Path | str | None = None,
    passages_per_question: int = 10,
    tokens_per_second: float | None = None,
    progress: ProgressCallback | None = None,
) -> Estimate:
    """Read and split a corpus, time the model on a little of it, and work out the rest.

    Args:
        paths: Files and folders, see ``read_documents``.
        cache: The model; without a directory, so that nothing is written.
        splitter: Cuts documents into passages.
        directory: Where the index is to lie; None leaves out whether it fits.
        passages_per_question: How many passages a prompt will hold.
        tokens_per_second: Rate at which passages will be encoded, on another machine say; None
            measures it here.
        progress: Called after each document.

    Raises:
        InvalidInputError: If no passage can be read below ``paths``, or a number is not positive.
    """
    if passages_per_question < 1 or (tokens_per_second is not None and not tokens_per_second > 0):
        raise InvalidInputError("passages_per_question and tokens_per_second must be positive")
    corpus = _Corpus(cache, splitter, JobTally(progress))
    corpus.read(paths)
    if not corpus.sample:
        reasons = "".join(
            f"; {failure.source}: {failure.reason}" for failure in islice(corpus.tally.failures, _SHOWN)
        )
        raise InvalidInputError(f"there is no passage to be read; name files or folders with text{reasons}")
    speed = _given(tokens_per_second) if tokens_per_second else _measured(cache, corpus.sample)
    return _worked_out(corpus, speed, passages_per_question, directory)


class _Corpus:
    """Counts what documents hold, and keeps the first passages as a sample."""

    def __init__(self, cache: BlockCache, splitter: PassageSplitter, tally: JobTally) -> None:
        self._cache, self._splitter, self.tally = cache, splitter, tally
        self._seen: set[bytes] = set()  # 16 bytes a passage are all that is remembered
        self._sample_limit = min(_SAMPLE_TOKENS, cache.model.max_length // 2)
        self._sample_tokens = 0
        self.num_documents = self.num_passages = self.num_tokens = self.num_bytes = 0
        self.sample: list[Passage] = []

    def read(self, paths: Sequence[Path | str]) -> None:
        """Go through all documents."""
        with self.tally.timed("scan"):
            for document in read_documents(paths, on_failure=self.tally.fail_document):
                self.num_documents += 1
                for number, passage in enumerate(split_document(document, self._splitter), 1):
                    try:
                        self._count(*named_passage(self._cache, passage))
                    except InvalidInputError as error:
                        self.tally.fail_document(document.document_id, f"passage {number}: {error}")
                self.tally.tell("scan", self.num_documents, num_tokens=self.num_tokens)

    def _count(self, record: PassageRecord, passage: Passage) -> None:
        name = bytes.fromhex(record.passage_id)
        if name in self._seen:
            return
        self._seen.add(name)
        self.num_passages += 1
        self.num_tokens += record.num_tokens
        self.num_bytes += self._cache.block_bytes(record.num_tokens)
        self._keep(passage, record.num_tokens)

    def _keep(self, passage: Passage, num_tokens: int) -> None:
        """Take a passage into the sample while it has room; of those too long for it, the shortest."""
        if self._sample_tokens + num_tokens <= self._sample_limit:
            self.sample.append(passage)
            self._sample_tokens += num_tokens
        elif not self.sample or (
            self._sample_tokens > self._sample_limit and num_tokens < self._sample_tokens
        ):
            self.sample, self._sample_tokens = [passage], num_tokens


def _given(tokens_per_second: float) -> Speed:
    """Take one rate for everything that is computed, and reuse for free."""
    each = 1 / tokens_per_second
    return Speed(tokens_per_second, each, 0.0, each * len(_QUESTION.split()), is_measured=False)


def _measured(cache: BlockCache, sample: Sequence[Passage]) -> Speed:
    """Time encoding, and prompts of no passage and of all in the sample, with and without reuse."""
    num_tokens = sum(len(cache.block(passage).token_ids) for passage in sample)
    cache.first_logits(_QUESTION, sample[:1], policy="block")  # warms up what is loaded at first use
    encode_seconds = _encode_seconds(cache, sample)
    question_seconds = _best_of_two(lambda: cache.first_logits(_QUESTION, [], policy="full"))
    full_seconds = _best_of_two(lambda: cache.first_logits(_QUESTION, sample, policy="full"))
    reuse_seconds = _best_of_two(lambda: cache.first_logits(_QUESTION, sample, policy="block"))
    return Speed(
        tokens_per_second=num_tokens / encode_seconds,
        full_seconds_per_token=max(full_seconds - question_seconds, 0.0) / num_tokens,
        reuse_seconds_per_token=max(reuse_seconds - question_seconds, 0.0) / num_tokens,
        question_seconds=question_seconds,
        is_measured=True,
    )


def _encode_seconds(cache: BlockCache, sample: Sequence[Passage]) -> float:
    for passage in sample:
        cache.store.pop(cache.block(passage).block_id, None)
    started = time.perf_counter()
    cache.prefill(sample)
    return time.perf_counter() - started


def _best_of_two(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _worked_out(
    corpus: _Corpus,
    speed: Speed,
    passages_per_question: int,
    directory: Path | str | None,
) -> Estimate:
    passage_tokens = corpus.num_tokens / corpus.num_passages
    prompt_tokens = passage_tokens * min(passages_per_question, corpus.num_passages)
    saved = speed.full_seconds_per_token - speed.reuse_seconds_per_token
    num_bytes = corpus.num_bytes
    free_bytes = None if directory is None else _free_bytes(Path(directory))
    return Estimate(
        num_documents=corpus.num_documents,
        num_failed_documents=len(corpus.tally.failed_documents),
        num_passages=corpus.num_passages,
        num_tokens=corpus.num_tokens,
        num_bytes=num_bytes,
        free_bytes=free_bytes,
        fits=None if free_bytes is None else num_bytes <= free_bytes,
        prefill_hours=corpus.num_tokens / speed.tokens_per_second / _SECONDS_PER_HOUR,
        passages_per_question=passages_per_question,
        full_ttft_seconds=speed.question_seconds + prompt_tokens * speed.full_seconds_per_token,
        reuse_ttft_seconds=speed.question_seconds + prompt_tokens * speed.reuse_seconds_per_token,
        break_even_uses=math.ceil(1 / (speed.tokens_per_second * saved) - 1e-9) if saved > 0 else None,
        break_even_bytes_per_second=num_bytes / corpus.num_tokens / saved if saved > 0 else None,
        break_even_reads_per_second=1 / (saved * passage_tokens) if saved > 0 else None,
        speed=speed,
        failures=tuple(corpus.tally.failures),
    )


def _free_bytes(directory: Path) -> int:
    """Return the space free at a directory that need not exist yet."""
    existing = next(path for path in [directory.absolute(), *directory.absolute().parents] if path.exists())
    return shutil.disk_usage(existing).free
