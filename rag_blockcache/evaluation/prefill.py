"""Throughput of encoding passages, against the same model's own batched forward pass."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation import page_cache
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.places import scratch_folder
from rag_blockcache.evaluation.stopwatch import Clock, Spread, in_turn, ratios
from rag_blockcache.evaluation.token_prompts import mixed_passages, token_run
from rag_blockcache.model import Model
from rag_blockcache.passages import block_id
from rag_blockcache.store import DiskStore

logger = logging.getLogger(__name__)

_BARE_LENGTH = 100  # tokens in a row of the bare forward pass: no padding, so it is at its best
_BATCH_SIZES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (8, 32, 128, 256, 512)}
_STAND_IN_TOKENS = 85  # those of ``conditioning.STAND_INS``, as SmolLM2 reads them in the paper's format
_SWEEP_SHARE = 0.2  # of the tokens, for each batch size that is tried


@dataclass(frozen=True)
class PrefillMeasure:
    """Throughput of encoding passages.

    Attributes:
        environment: Where this was measured.
        repeats: Rounds, after one to warm up.
        num_passages: Passages encoded in each round.
        num_tokens: Their tokens.
        shortest: Tokens of the shortest passage asked for.
        longest: Of the longest.
        encode: Tokens per second of ``encode_blocks``, all states kept.
        behind: The same behind as many tokens as stand-ins have.
        store: Tokens per second of encoding and storing on disk, batch by batch.
        bare: Tokens per second of the bare model's forward pass: rows of equal length, at the best of
            several batch sizes, keeping nothing.
        bare_mixed: The same over the passages themselves, sorted by length and padded, in as many rows.
        encode_share: ``encode`` as a share of ``bare``, in pairs.
        behind_share: ``behind`` likewise.
        store_share: ``store`` as a share of ``bare``, in pairs.
        encode_share_mixed: ``encode`` as a share of ``bare_mixed``, in pairs.
        behind_share_mixed: ``behind`` likewise.
        store_share_mixed: ``store`` likewise.
        bare_by_batch: Tokens per second of the bare pass at each batch size that was tried.
        bare_batch_size: Rows in the best of them.
        num_bytes: Keys and values written in each round.
        write_bytes_per_second: Over the time in which blocks were written, as the job waits for it: most
            of it reaches the page cache, not the disk.
        durable_bytes_per_second: The same with the time that the disk then took.
    """

    environment: Environment
    repeats: int
    num_passages: int
    num_tokens: int
    shortest: int
    longest: int
    encode: Spread
    behind: Spread
    store: Spread
    bare: Spread
    bare_mixed: Spread
    encode_share: Spread
    behind_share: Spread
    store_share: Spread
    encode_share_mixed: Spread
    behind_share_mixed: Spread
    store_share_mixed: Spread
    bare_by_batch: dict[int, float]
    bare_batch_size: int
    num_bytes: int
    write_bytes_per_second: Spread
    durable_bytes_per_second: Spread

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, and as ``rows`` what a table of it shows."""
        ways = {
            "bare forward, rows of equal length, nothing kept": (self.bare, None, None),
            "bare forward, these passages, nothing kept": (self.bare_mixed, None, None),
            "encoder, states kept": (self.encode, self.encode_share, self.encode_share_mixed),
            "encoder, behind stand-ins": (self.behind, self.behind_share, self.behind_share_mixed),
            "encoder and disk": (self.store, self.store_share, self.store_share_mixed),
        }
        rows = [
            {
                "way": way,
                "tokens_per_second": round(rate.median),
                "percent_of_bare": None if share is None else 100 * share.median,
                "percent_of_mixed": None if mixed is None else 100 * mixed.median,
                "write_bytes": self.write_bytes_per_second.median if rate is self.store else None,
            }
            for way, (rate, share, mixed) in ways.items()
        ]
        columns = {
            "way": "",
            "tokens_per_second": "tokens/s",
            "percent_of_bare": "% of rows of equal length",
            "percent_of_mixed": "% of these passages",
            "write_bytes": "written, per second",
        }
        found = dataclasses.asdict(self)
        return {**found.pop("environment"), "columns": columns, "rows": rows, **found}


@dataclass(frozen=True)
class _Pass:
    """One round of one way."""

    num_tokens: int
    seconds: float
    write_seconds: float = 0.0
    sync_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


def measure_prefill(
    model: Model,
    *,
    num_tokens: int = 20000,
    passage_tokens: tuple[int, int] = (60, 200),
    repeats: int = 3,
    text: str | None = None,
    name: str | None = None,
    directory: Path | str | None = None,
    progress: Callable[[str], None] | None = None,
) -> PrefillMeasure:
    """Time the encoder over passages of mixed lengths, with and without a disk, against the bare model.

    Args:
        model: The model.
        num_tokens: Tokens in each round.
        passage_tokens: Bounds of the passages' lengths, which lie evenly between them.
        repeats: Rounds in which the ways take turns, after one to warm up.
        text: Passages are cut from it; None takes random tokens.
        name: Of the model, for the report; None takes that in its configuration.
        directory: Blocks are written in it while this runs; None takes a place for temporary files.
        progress: Called with a line at each round.

    Raises:
        InvalidInputError: If the numbers do not go together, or the text is too short.
    """
    shortest, longest = passage_tokens
    if repeats < 1 or not 1 <= shortest <= longest <= num_tokens or num_tokens < _BARE_LENGTH:
        raise InvalidInputError(
            f"needed are one repeat at least, {_BARE_LENGTH} tokens at least, and lengths from 1 up to the "
            f"number of tokens; got {repeats}, {num_tokens} and {shortest} to {longest}"
        )
    tell = progress or logger.info
    run = token_run(model, num_tokens, text)
    passages = mixed_passages(run, shortest, longest)
    tell("trying batch sizes of the bare forward pass")
    equal = [run[at : at + _BARE_LENGTH] for at in range(0, num_tokens - _BARE_LENGTH + 1, _BARE_LENGTH)]
    by_batch = {size: _best_bare_rate(model, equal, size) for size in _batch_sizes(model, num_tokens)}
    best = max(by_batch, key=lambda size: by_batch[size])
    ways = {
        "bare": lambda: _bare(model, equal, best),
        "mixed": lambda: _bare(model, passages, best),
        "encode": lambda: _encode(model, passages),
        "behind": lambda: _encode(model, passages, behind=run[:_STAND_IN_TOKENS]),
        "store": lambda: _encode_and_store(model, passages, directory),
    }
    _, times = in_turn(ways, repeats, lambda n: tell(f"round {n} of {repeats}" if n else "warming up"))
    rates = {way: [each.rate for each in passes] for way, passes in times.items()}
    num_bytes = num_tokens * model.kv_bytes_per_token
    return PrefillMeasure(
        environment=Environment.of(model, name),
        repeats=repeats,
        num_passages=len(passages),
        num_tokens=num_tokens,
        shortest=shortest,
        longest=longest,
        encode=Spread.of(rates["encode"]),
        behind=Spread.of(rates["behind"]),
        store=Spread.of(rates["store"]),
        bare=Spread.of(rates["bare"]),
        bare_mixed=Spread.of(rates["mixed"]),
        encode_share=ratios(rates["encode"], rates["bare"]),
        behind_share=ratios(rates["behind"], rates["bare"]),
        store_share=ratios(rates["store"], rates["bare"]),
        encode_share_mixed=ratios(rates["encode"], rates["mixed"]),
        behind_share_mixed=ratios(rates["behind"], rates["mixed"]),
        store_share_mixed=ratios(rates["store"], rates["mixed"]),
        bare_by_batch=by_batch,
        bare_batch_size=best,
        num_bytes=num_bytes,
        write_bytes_per_second=Spread.of(num_bytes / each.write_seconds for each in times["store"]),
        durable_bytes_per_second=Spread.of(
            num_bytes / (each.write_seconds + each.sync_seconds) for each in times["store"]
        ),
    )


def _batch_sizes(model: Model, num_tokens: int) -> list[int]:
    sizes = _BATCH_SIZES.get(model.device.type, _BATCH_SIZES["cuda"])
    return [size for size in sizes if size * _BARE_LENGTH <= num_tokens]


def _best_bare_rate(model: Model, rows: Sequence[Sequence[int]], batch_size: int) -> float:
    num_rows = max(int(len(rows) * _SWEEP_SHARE), batch_size)
    _bare(model, rows[:batch_size], batch_size)
    return max(_bare(model, rows[:num_rows], batch_size).rate for _ in range(2))


@torch.inference_mode()
def _bare(model: Model, rows: Sequence[Sequence[int]], batch_size: int) -> _Pass:
    """Run the decoder as a user would who wants nothing but speed: no cache, no logits.

    Rows of other lengths are sorted and padded at the end, where a causal mask hides it.
    """
    clock = Clock(model.device)
    ordered = [torch.tensor(row) for row in sorted(rows, key=len)]
    start = clock()
    for at in range(0, len(ordered), batch_size):
        input_ids = pad_sequence(ordered[at : at + batch_size], batch_first=True).to(model.device)
        model.backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return _Pass(sum(map(len, rows)), clock() - start)


def _encode(model: Model, passages: Sequence[Sequence[int]], *, behind: Sequence[int] = ()) -> _Pass:
    clock = Clock(model.device)
    before = None
    if behind:
        [[(_, before)]] = encode_blocks(model, [behind])
    start = clock()
    batches = encode_blocks(model, passages, conditioned_on=before)
    kept = [states for batch in batches for _, states in batch]
    seconds = clock() - start
    return _Pass(sum(states.num_tokens for states in kept), seconds)


def _encode_and_store(model: Model, passages: Sequence[Sequence[int]], directory: Path | str | None) -> _Pass:
    clock = Clock(model.device)
    with scratch_folder(directory) as folder, DiskStore(folder) as store:
        start, write_seconds = clock(), 0.0
        for batch in encode_blocks(model, passages):
            encoded = clock()
            store.put_many(
                # Numbered: a run of little variety could hold one passage twice, which is stored once.
                {block_id([index, *passages[index]], fingerprint=""): states for index, states in batch}
            )
            write_seconds += clock() - encoded
        seconds = clock() - start
        page_cache.sync(page_cache.block_files(Path(folder)))
        return _Pass(
            num_tokens=sum(map(len, passages)),
            seconds=seconds,
            write_seconds=write_seconds,
            sync_seconds=clock() - start - seconds,
        )
