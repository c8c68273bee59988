"""A corpus, an engine without a model, and the whole state of an index, for tests of the indexing job."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import byte_tokenizer

from rag_blockcache.answers import PrefillProgress, PrefillReport
from rag_blockcache.errors import ContextTooLongError
from rag_blockcache.jobs.documents import PassageSplitter
from rag_blockcache.jobs.index_and_prefill import index_and_prefill
from rag_blockcache.kv_states import KVStates
from rag_blockcache.manifest import Manifest
from rag_blockcache.passages import Block, Passage, block_id
from rag_blockcache.retriever import Retriever
from rag_blockcache.store import DiskStore, TieredStore

WINDOW = 400


class FakeCache:
    """What the job asks of a ``BlockCache``, with a real disk store and states made from the tokens."""

    def __init__(
        self, directory: Path | None, fingerprint: str = "fake", *, disk_budget_bytes: int | None = None
    ) -> None:
        self.fingerprint, self.codec = fingerprint, "none"
        self.store = TieredStore(None, DiskStore(directory / "blocks", size_limit_bytes=disk_budget_bytes))
        self.model = SimpleNamespace(
            max_length=WINDOW,
            dtype=torch.float32,
            network=SimpleNamespace(name_or_path=f"models/{fingerprint}"),
        )
        self.prompt = SimpleNamespace(format=SimpleNamespace(name="paper"), preamble="")
        self.blocks_see = "themselves"
        self.encoded: list[str] = []
        self.registered: list[str] = []
        self.forgotten: list[str] = []

    def block(self, passage: Passage) -> Block:
        token_ids = tuple(f"{passage.title}|{passage.text}".encode())
        return Block(token_ids, block_id(token_ids, fingerprint=self.fingerprint))

    def block_bytes(self, num_tokens: int) -> int:
        return 32 * num_tokens

    def prefill(self, passages, *, progress=None, evict=True) -> PrefillReport:
        blocks = [self.block(passage) for passage in passages]
        if any(len(block.token_ids) > WINDOW for block in blocks):
            raise ContextTooLongError("too long")
        room = self.store.room(evicting=evict)
        unstored = [block for block in blocks if not self.store.keeps(block.block_id)]
        missing = [block for block in unstored if room.take(32 * len(block.token_ids))]
        for number, block in enumerate(missing, 1):
            states = (
                torch.tensor(block.token_ids, dtype=torch.float32).reshape(1, 1, -1, 1).repeat(2, 1, 1, 2)
            )
            self.store.put(block.block_id, KVStates(states, states + 1), cost_seconds=0.1)
            self.encoded.append(block.block_id)
            if progress is not None:
                progress(
                    PrefillProgress(len(blocks) - len(missing) + number, len(blocks), number, number, 0.1)
                )
        num_tokens = sum(len(block.token_ids) for block in missing)
        return PrefillReport(
            num_passages=len(blocks),
            num_encoded=len(missing),
            num_skipped=len(blocks) - len(unstored),
            num_tokens=num_tokens,
            num_bytes=32 * num_tokens,
            seconds=0.1,
            num_not_stored=len(unstored) - len(missing),
        )

    def register(self, passages) -> None:
        self.registered += list(passages)

    def forget(self, passages) -> None:
        self.forgotten += [passage.text for passage in passages]
        for passage in passages:
            self.store.pop(self.block(passage).block_id, None)

    def close(self) -> None:
        self.store.close()


def embed(texts):
    return np.array([[len(text), text.count("e") + 1.0, text.count("a")] for text in texts])


def splitter() -> PassageSplitter:
    return PassageSplitter(byte_tokenizer(), max_tokens=60)


def run(directory: Path, paths, *, cache=None, index_factory=None, **options):
    """Run the job once, on a directory that is opened for it and closed again."""
    with ExitStack() as stack:
        cache = stack.enter_context(closing(cache or FakeCache(directory)))
        retriever = Retriever(directory / "index", embedder=embed, index_factory=index_factory)
        stack.enter_context(closing(retriever))
        manifest = stack.enter_context(closing(Manifest(directory)))
        return index_and_prefill(
            paths,
            cache=cache,
            retriever=retriever,
            manifest=manifest,
            splitter=options.pop("splitter", None) or splitter(),
            **options,
        )


def state(directory: Path) -> dict[str, object]:
    """Return all that an index holds: manifest rows, passages with their vectors, blocks with their bytes."""
    tables = ("settings", "documents", "blocks", "passages", "holdings", "refusals")
    with closing(sqlite3.connect(directory / "manifest.sqlite")) as connection:
        rows = {table: sorted(connection.execute(f"SELECT * FROM {table}")) for table in tables}
    with closing(sqlite3.connect(directory / "index" / "passages.sqlite")) as connection:
        vectors = sorted(
            connection.execute(
                "SELECT passage_id, title, text, metadata, embedding "
                "FROM passages JOIN vectors USING (vector_id)"
            )
        )
    with closing(DiskStore(directory / "blocks")) as store:
        blocks = {name: store[name].keys.numpy().tobytes() for name in sorted(store)}
    return {**rows, "vectors": vectors, "stored": blocks}


def run_and_die(directory: Path, paths, num_events: int, results) -> None:
    """Run the job and kill this process at its ``num_events``-th call or return of one of our functions."""
    count = 0

    def tick(frame, event, argument):
        nonlocal count
        if "rag_blockcache" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            count += 1
            if count == num_events:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(tick)
    run(directory, paths)
    sys.setprofile(None)
    results.put(count)
