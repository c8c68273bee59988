"""Passages come and go in a prefilled index, and vectors, blocks, texts and record go with them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest
from job_corpus import FakeCache, splitter

from rag_blockcache import BlockCache, Passage, SharedCache, Text
from rag_blockcache.cli.opening import open_index
from rag_blockcache.errors import IndexMismatchError, InvalidInputError, OutOfSpaceError, StoreError
from rag_blockcache.jobs.index_and_prefill import index_and_prefill
from rag_blockcache.jobs.index_change import IndexChange
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.maintenance import collect_garbage, status, verify
from rag_blockcache.manifest import Manifest
from rag_blockcache.passage_registry import PassageRegistry
from rag_blockcache.prefilled_index import PrefilledIndex
from rag_blockcache.retriever import Retriever

ADA = "Ada Lovelace wrote the longest note on the analytical engine in 1843."
BOB = "Bob looks after the lighthouse on the north rock since his aunt left."
CAT = "The cat of the lighthouse keeper sleeps on the chart table all winter."


def embed(texts):
    return np.array([[len(text), text.count("e") + 1.0, text.count("a")] for text in texts])


def named(text, name, **metadata):
    return Passage(text, passage_id=name, metadata=metadata)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
def cache(tiny_model, tiny_tokenizer, directory):
    with BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer, passage_format="verbatim") as cache:
        yield cache


@pytest.fixture
def index(directory, cache):
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        yield index


def known_texts(directory, among=(ADA, BOB, CAT)):
    with PassageRegistry(directory) as registry:
        return [text for text in among if text in registry]


def stored(cache, *texts):
    return [cache.block(text).block_id in cache.store.disk for text in texts]


@contextmanager
def parts(directory, cache):
    """What the commands of the library work on, opened beside the index."""
    with (
        closing(Retriever(directory / "index", embedder=embed)) as retriever,
        closing(Manifest(directory)) as manifest,
    ):
        yield {"cache": cache, "retriever": retriever, "manifest": manifest}


def assert_whole(directory, cache):
    """Verify finds nothing, and there is no garbage: manifest, retriever and store agree."""
    with parts(directory, cache) as opened:
        report = verify(**opened)
        assert report.is_sound, report
        garbage = collect_garbage(**opened, dry_run=True)
        assert (garbage.num_passages, garbage.num_blocks) == (0, 0)


# What is put in is searchable, prefilled and on record


def test_added_passages_are_found_and_their_blocks_are_stored(index, directory, cache):
    assert index.add([named(ADA, "a", lang="en"), named(BOB, "b", lang="de")]) == ["a", "b"]
    assert index.search(BOB, k=1)[0].passage == named(BOB, "b", lang="de")
    assert [found.passage.passage_id for found in index.search(embed([ADA])[0], where={"lang": "de"})] == [
        "b"
    ]
    assert [found.passage.passage_id for found in index.search(ADA, among=["b", "c"])] == ["b"]
    assert index.get(["b", "a", "c"]) == [named(BOB, "b", lang="de"), named(ADA, "a", lang="en")]
    assert index.find({"lang": "en"}) == ["a"]
    assert (list(index), len(index), "a" in index, "c" in index) == (["a", "b"], 2, True, False)
    np.testing.assert_allclose(index.vectors(["a"])["a"], embed([ADA])[0] / np.linalg.norm(embed([ADA])))
    assert stored(cache, ADA, BOB) == [True, True]
    assert known_texts(directory) == [ADA, BOB]
    assert_whole(directory, cache)
    counts = status(directory).counts
    assert (counts.num_passages, counts.num_blocks, counts.num_pending_blocks) == (2, 2, 0)


def test_answers_reuse_the_blocks_of_what_was_added(index, cache):
    index.add([ADA, BOB])
    answer = cache.answer(Text(f"{BOB}\n\n{ADA}\n\nWho wrote it?"), max_new_tokens=2, policy="block")
    assert (answer.num_hits, answer.num_misses) == (2, 0)


def test_ready_vectors_need_no_embedder(directory, cache):
    with PrefilledIndex(directory, cache=cache) as index:
        index.add([named(ADA, "a"), named(BOB, "b")], embeddings=[[1, 0], [0, 2]])
        assert index.search([0, 1], k=1)[0].passage.passage_id == "b"
    assert status(directory).settings.embedder == ""


def test_progress_is_told_for_both_stages(index):
    told = []
    index.add([ADA, BOB], progress=told.append)
    assert (told[0].stage, told[0].num_done, told[0].num_total) == ("embed", 2, 2)
    assert (told[-1].stage, told[-1].num_done, told[-1].num_total) == ("prefill", 2, 2)
    assert told[-1].num_tokens == index.totals.num_tokens > 0


def test_adding_the_same_again_changes_nothing(index, directory, cache):
    same = [
        Passage(ADA, metadata=metadata) for metadata in ({}, {"source": "x"}, {"source": "y"}, {"page": 1})
    ]
    names = index.add(same)
    assert len(set(names)) == len(index) == 4
    before = index.totals
    assert (before.num_added_passages, before.num_encoded_blocks) == (4, 1)
    assert (index.add(same), len(index)) == (names, 4)
    assert index.totals == before + IndexChange(num_added_passages=4, num_skipped_blocks=4)
    assert_whole(directory, cache)


def test_of_two_passages_with_one_name_in_one_call_the_last_counts(index, directory, cache):
    passages = [named(ADA, "a"), named(BOB, "b"), named(CAT, "a")]
    vectors = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert index.add(passages, embeddings=vectors, source_ids=["x", "y", "z"]) == ["a", "b", "a"]
    assert index.get(["a"])[0].text == CAT
    np.testing.assert_allclose(index.vectors(["a"])["a"], [0, 0, 1])
    assert stored(cache, ADA, BOB, CAT) == [False, True, True]
    assert index.delete_source("x") == 0
    assert index.delete_source("z") == 1
    assert list(index) == ["b"]
    assert_whole(directory, cache)


def test_nothing_added_is_nothing_done(index, directory):
    assert index.add([]) == []
    assert not (directory / "manifest.sqlite").exists()


# Deleting, replacing


def test_a_block_and_its_text_stay_until_the_last_passage_with_them_goes(index, directory, cache):
    index.add([named(ADA, "a"), named(ADA, "also a"), named(BOB, "b")])
    assert index.delete(["a", "not there"]) == 1
    assert stored(cache, ADA) == [True]
    assert known_texts(directory) == [ADA, BOB]
    assert index.delete(["also a"]) == 1
    assert stored(cache, ADA, BOB) == [False, True]
    assert known_texts(directory) == [BOB]
    assert (list(index), index.totals.num_dropped_blocks) == (["b"], 1)
    assert_whole(directory, cache)


def test_a_text_stays_known_as_long_as_it_stands_under_another_title(index, directory, cache):
    index.add([Passage(ADA, title=title, passage_id=title) for title in ("Notes", "Letters", "Papers")])
    assert index.totals.num_encoded_blocks == 1
    for title in ("Notes", "Letters"):
        index.delete([title])
        assert (stored(cache, ADA), known_texts(directory)) == ([True], [ADA])
        answer = cache.answer(Text(f"{ADA}\n\nWho wrote it?"), max_new_tokens=2, policy="block")
        assert (answer.num_hits, answer.num_misses) == (1, 0)
    index.delete(["Papers"])
    assert (stored(cache, ADA), known_texts(directory)) == ([False], [])
    assert_whole(directory, cache)


def test_a_passage_put_under_a_name_takes_the_place_of_the_former(index, directory, cache):
    index.add([named(ADA, "a"), named(BOB, "b")])
    index.add([named(CAT, "a", lang="en")])
    assert index.get(["a"]) == [named(CAT, "a", lang="en")]
    assert index.search(CAT, k=1)[0].score == pytest.approx(1)
    assert stored(cache, ADA, BOB, CAT) == [False, True, True]
    assert known_texts(directory) == [BOB, CAT]
    assert (len(index), index.totals.num_dropped_blocks) == (2, 1)
    assert_whole(directory, cache)


def test_two_passages_may_swap_their_texts(index, directory, cache):
    index.add([named(ADA, "a"), named(BOB, "b")])
    index.add([named(BOB, "a"), named(ADA, "b")])
    assert [passage.text for passage in index.get(["a", "b"])] == [BOB, ADA]
    assert stored(cache, ADA, BOB) == [True, True]
    assert known_texts(directory) == [ADA, BOB]
    assert index.totals.num_encoded_blocks == 2
    assert_whole(directory, cache)


def test_a_source_goes_with_what_came_from_it_and_nothing_else(index, directory, cache):
    index.add([named(ADA, "a"), named(BOB, "b"), named(ADA, "c")], source_ids=["x", "x", "y"])
    assert index.delete_source("z") == 0
    assert index.delete_source("x") == 2
    assert list(index) == ["c"]
    assert stored(cache, ADA, BOB) == [True, False]
    assert index.delete_source("x") == 0
    assert_whole(directory, cache)


def test_the_source_is_taken_from_the_metadata_by_default(index):
    index.add([named(ADA, "a", source="x"), named(BOB, "b", source=7)])
    assert index.delete_source("x") == 1
    assert list(index) == ["b"]


def test_clearing_leaves_no_passage_no_text_and_no_block(index, directory, cache):
    before = set(cache.store)
    index.add([ADA, BOB, CAT])
    assert index.clear() == 3
    assert (len(index), index.search(ADA)) == (0, [])
    assert set(cache.store) == before
    assert known_texts(directory) == []
    assert_whole(directory, cache)


def test_other_forms_are_known_and_not_encoded_and_go_with_their_passage(directory, cache):
    def other_forms(passage):
        return passage.metadata.get("shown", [])

    with PrefilledIndex(directory, cache=cache, embedder=embed, other_forms=other_forms) as index:
        index.add([named(ADA, "a", shown=[BOB, CAT]), named(CAT, "c")])
        assert known_texts(directory) == [ADA, BOB, CAT]
        assert stored(cache, ADA, BOB, CAT) == [True, False, True]
        cache.prefill([BOB])  # as an answer does that meets it
        index.add([named(ADA, "a", shown=[BOB])])
        assert known_texts(directory) == [ADA, BOB, CAT]
        index.delete(["a"])
        assert known_texts(directory) == [CAT]  # a passage of its own
        assert stored(cache, ADA, BOB, CAT) == [False, False, True]


# Now or later, with a model or without


def test_what_is_not_prefilled_at_once_is_prefilled_when_asked_for(index, directory, cache):
    index.add([ADA, BOB], prefill=False)
    assert stored(cache, ADA, BOB) == [False, False]
    assert status(directory).counts.num_pending_blocks == 2
    told = []
    assert index.prefill(progress=told.append).num_encoded_blocks == 2
    assert told[-1].num_done == told[-1].num_total == 2
    assert known_texts(directory) == [ADA, BOB]
    assert index.prefill() == IndexChange()
    assert_whole(directory, cache)


def test_blocks_without_room_in_the_disk_budget_stay_pending(tiny_model, tiny_tokenizer, directory, caplog):
    options = {"tokenizer": tiny_tokenizer, "passage_format": "verbatim", "memory_budget_bytes": 0}
    with (
        BlockCache(tiny_model, directory, disk_budget_bytes=60_000, **options) as cache,
        PrefilledIndex(directory, cache=cache, embedder=embed) as index,
    ):
        index.add([ADA, BOB, CAT])
        assert index.totals.num_not_stored_blocks > 0
        assert len(index) == 3
        assert index.prefill().num_not_stored_blocks == index.totals.num_not_stored_blocks / 2
        assert "run the same command again with a larger budget" in caplog.text
    with BlockCache(tiny_model, directory, disk_budget_bytes=10**7, **options) as cache:
        with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
            index.prefill()
        assert stored(cache, ADA, BOB, CAT) == [True] * 3
        assert_whole(directory, cache)


def test_passages_collected_without_a_model_are_recorded_when_there_is_one(directory, cache):
    with PrefilledIndex(directory, embedder=embed) as index:
        index.add([named(ADA, "a"), named(BOB, "b"), named(CAT, "c")])
        assert index.delete(["c"]) == 1
        assert index.prefill() == IndexChange()
    assert not (directory / "manifest.sqlite").exists()
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        assert index.prefill().num_encoded_blocks == 2
    assert_whole(directory, cache)
    assert known_texts(directory) == [ADA, BOB]


def test_an_index_with_blocks_is_searched_without_their_model_but_not_changed(index, directory):
    index.add([named(ADA, "a"), named(BOB, "b")])
    with PrefilledIndex(directory, embedder=embed) as other:
        assert other.search(BOB, k=1)[0].passage.passage_id == "b"
        for change in (lambda: other.add([CAT]), lambda: other.delete(["a"]), other.clear):
            with pytest.raises(InvalidInputError, match="open it with that model"):
                change()
    assert len(index) == 2


def test_a_shared_cache_is_loaded_at_the_first_change_and_again_when_others_closed_it(
    tiny_model, tiny_tokenizer, directory
):
    options = {"tokenizer": tiny_tokenizer, "passage_format": "verbatim"}
    shared = SharedCache(tiny_model, directory, **options)
    with PrefilledIndex(directory, cache=shared, embedder=embed) as index:
        assert index.search(ADA) == []
        assert not shared.is_loaded
        index.add([ADA])
        assert shared.is_loaded
        SharedCache(tiny_model, directory, **options).close()
        index.add([BOB])
        assert stored(shared.get(), ADA, BOB) == [True, True]
    assert_whole(directory, shared.get())
    shared.close()


# Together with the job over files


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "ada.txt").write_text(ADA)
    (folder / "bob.txt").write_text(BOB)
    return folder


def run_job(directory, cache, files):
    with parts(directory, cache) as opened:
        return index_and_prefill([files], splitter=splitter(), **opened)


def test_an_index_made_by_the_job_is_searched_and_added_to(directory, cache, files):
    run_job(directory, cache, files)
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        assert index.search(BOB, k=1)[0].passage.text.startswith("Bob")
        before = len(index)
        index.add([named(CAT, "c")])
        assert len(index) == before + 1
    assert_whole(directory, cache)
    (files / "bob.txt").unlink()
    report = run_job(directory, cache, files)
    assert report.num_gone_documents == 1
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        texts = " ".join(passage.text for passage in index.get(list(index)))
        assert CAT in texts
        assert "Bob" not in texts
    assert_whole(directory, cache)


def test_what_the_job_indexed_is_deleted_by_name_and_by_file(directory, cache, files):
    run_job(directory, cache, files)
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        name = index.search(BOB, k=1)[0].passage.passage_id
        assert index.delete([name]) == 1
        assert index.delete_source(str(files / "ada.txt")) > 0
        assert "Ada" not in " ".join(passage.text for passage in index.get(list(index)))
        assert_whole(directory, cache)
        index.clear()
    assert len(status(directory).failures) == status(directory).counts.num_documents == 0
    assert run_job(directory, cache, files).num_new_documents == 2  # cleared is not the same as unchanged


def test_a_passage_of_the_job_that_is_put_again_by_its_name_stays_when_its_file_goes(directory, cache, files):
    run_job(directory, cache, files)
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        found = index.search(BOB, k=1)[0].passage
        index.add([found])
    (files / "bob.txt").unlink()
    run_job(directory, cache, files)
    with PrefilledIndex(directory, cache=cache, embedder=embed) as index:
        assert found in index.get([found.passage_id])
    assert_whole(directory, cache)


@pytest.mark.parametrize("has_model", [True, False])
def test_a_job_over_files_leaves_an_index_of_a_vector_store_alone(directory, cache, files, has_model):
    with PrefilledIndex(directory, cache=cache if has_model else None) as index:
        index.add([named(ADA, "a")], embeddings=[[1, 0, 0]])
    with pytest.raises(
        IndexMismatchError, match=r"a vector store .* add documents through that store, or index"
    ):
        run_job(directory, cache, files)
    with PrefilledIndex(directory, cache=cache) as index:
        assert (list(index), list(index.vectors(["a"]))) == (["a"], ["a"])
    assert status(directory).counts.num_passages == int(has_model)


# What does not fit is refused


def test_another_model_or_format_is_refused_and_nothing_is_changed(
    index, directory, tiny_model, tiny_tokenizer
):
    index.add([ADA])
    for options, message in (
        ({"salt": "other", "passage_format": "verbatim"}, "was made with the model"),
        (
            {"passage_format": "plain"},
            "was made with the passage format verbatim, not the passage format plain",
        ),
        (
            {"passage_format": "verbatim", "blocks_see": "preamble"},
            "was made with blocks_see='stand-ins', not blocks_see='preamble'",
        ),
    ):
        with (
            BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer, **options) as other,
            PrefilledIndex(directory, cache=other, embedder=embed) as second,
            pytest.raises(IndexMismatchError, match=message),
        ):
            second.add([BOB])
    assert len(index) == 1


def test_an_index_whose_blocks_attend_to_the_preamble_is_opened_by_its_record(
    tiny_model_path, directory, tmp_path
):
    options = {"passage_format": "verbatim", "blocks_see": "preamble", "preamble": "Be brief.\n\n"}
    with (
        BlockCache(tiny_model_path, directory, **options) as cache,
        PrefilledIndex(directory, cache=cache, embedder=embed) as index,
    ):
        index.add([ADA])
        name = cache.block(ADA).block_id
    with open_index(directory, embedder=embed) as (cache, _):
        assert cache.block(ADA).block_id == name
        answer = cache.generate("Who?", [ADA], policy="block", max_new_tokens=1)
        assert (answer.num_hits, answer.num_misses) == (1, 0)
    with BlockCache(tiny_model_path, None, passage_format="verbatim", preamble="Be brief.\n\n") as alone:
        assert alone.block(ADA).block_id != name


def test_what_was_interrupted_is_not_settled_by_another_model(index, directory, tiny_model, tiny_tokenizer):
    index.add([named(ADA, "a")])
    with closing(sqlite3.connect(directory / "manifest.sqlite")) as connection, connection:
        connection.execute("UPDATE passages SET is_embedded = 0")
    options = {"tokenizer": tiny_tokenizer, "passage_format": "verbatim", "salt": "other"}
    with (
        BlockCache(tiny_model, directory, **options) as other,
        PrefilledIndex(directory, cache=other, embedder=embed) as second,
        pytest.raises(IndexMismatchError),
    ):
        second.add([BOB])
    with closing(Manifest(directory)) as manifest:
        assert manifest.unfinished_passages() == ["a"]


def test_a_cache_that_keeps_its_blocks_elsewhere_is_refused(tiny_model, tiny_tokenizer, directory, tmp_path):
    for place, message in ((None, "in memory only"), (tmp_path / "elsewhere", "elsewhere")):
        with (
            BlockCache(tiny_model, place, tokenizer=tiny_tokenizer) as cache,
            PrefilledIndex(directory, cache=cache, embedder=embed) as index,
            pytest.raises(InvalidInputError, match=message),
        ):
            index.add([ADA])


@pytest.mark.parametrize(
    ("passage", "message"),
    [
        (named("word " * 3000, "long"), "leaves no room in the model's window"),
        (named(ADA, "x", when=object()), "cannot be stored"),
        (named(ADA, "x", score=float("nan")), "cannot be stored"),
        (named(ADA, "half \ud800"), "cannot be added"),
        (named("half \ud800 a character", "x"), "cannot be stored"),
    ],
)
def test_a_passage_that_cannot_be_used_keeps_the_whole_call_from_changing_anything(
    index, directory, cache, passage, message
):
    index.add([named(ADA, "a")])
    with pytest.raises(InvalidInputError, match=message):
        index.add([named(BOB, "b"), passage])
    assert list(index) == ["a"]
    assert_whole(directory, cache)


def test_a_failure_in_the_middle_leaves_the_passages_as_they_were(index, directory, cache):
    index.add([named(ADA, "a")])
    with pytest.raises(IndexMismatchError, match="dimensions"):
        index.add([named(BOB, "a"), named(CAT, "c")], embeddings=[[1, 2], [3, 4]])
    assert index.get(["a", "c"]) == [named(ADA, "a")]
    assert index.prefill().num_encoded_blocks == 1
    assert known_texts(directory) == [ADA]
    assert_whole(directory, cache)


def test_a_full_disk_while_encoding_leaves_passages_indexed_and_blocks_pending(
    index, directory, cache, monkeypatch
):
    def full(*_, **__):
        raise OutOfSpaceError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(cache.store), "put_many", full)
        with pytest.raises(OutOfSpaceError):
            index.add([named(ADA, "a")])
    assert index.search(ADA, k=1)[0].passage.passage_id == "a"
    assert index.prefill().num_encoded_blocks == 1
    assert_whole(directory, cache)


def test_nothing_is_changed_while_a_job_needs_the_index_to_itself(index, directory):
    with index_lock(directory, exclusive=True), pytest.raises(StoreError, match="another job"):
        index.add([ADA])
    assert len(index) == 0


def test_a_closed_index_says_so(index):
    index.close()
    index.close()
    with pytest.raises(StoreError, match="was closed"):
        index.add([ADA])
    with pytest.raises(StoreError, match="was closed"):
        index.search(ADA)


# Growing, and in many hands


def steps_of(index, change):
    """Count the steps that SQLite takes, in hundreds."""
    connections = [
        index._retriever._table._database._connection,
        index._manifest._database._connection,
    ]
    count = 0

    def tick():
        nonlocal count
        count += 1

    for connection in connections:
        connection.set_progress_handler(tick, 100)
    change()
    for connection in connections:
        connection.set_progress_handler(None, 0)
    return count


def test_the_work_of_a_change_does_not_grow_with_the_index(directory):
    with closing(FakeCache(directory)) as cache, PrefilledIndex(directory, cache=cache) as index:

        def add(first, num_passages):
            passages = [
                named(f"passage {number}", f"{number}") for number in range(first, first + num_passages)
            ]
            index.add(passages, embeddings=np.eye(num_passages, 64) + 0.1, source_ids=["x"] * num_passages)

        add(0, 40)
        small = [
            steps_of(index, lambda: add(1000, 20)),
            steps_of(index, lambda: add(1000, 20)),  # put again
            steps_of(index, lambda: index.delete([str(number) for number in range(1000, 1020)])),
        ]
        for batch in range(30):
            add(2000 + 60 * batch, 60)
        large = [
            steps_of(index, lambda: add(1000, 20)),
            steps_of(index, lambda: add(1000, 20)),
            steps_of(index, lambda: index.delete([str(number) for number in range(1000, 1020)])),
        ]
    for before, after in zip(small, large, strict=True):
        assert after < 1.5 * before + 20


def test_threads_may_share_an_index(index, directory, cache):
    failures = []

    def work(number):
        try:
            for step in range(6):
                index.add([named(f"{ADA} By {number}.{step}", f"{number}"), named(BOB, f"bob {number}")])
                assert index.search(BOB, k=1)[0].score == pytest.approx(1)
                index.delete([f"bob {number}"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(index) == ["0", "1", "2", "3"]
    assert sorted(passage.text for passage in index.get(list(index))) == [f"{ADA} By {n}.5" for n in range(4)]
    assert known_texts(directory, [BOB]) == []
    assert_whole(directory, cache)


def test_an_index_that_nobody_closes_is_saved(directory, cache):
    PrefilledIndex(directory, cache=cache, embedder=embed).add([ADA])
    gc.collect()
    assert list((directory / "index").glob("vectors-*.faiss"))


# Killed at any instant


class RegisteringCache(FakeCache):
    """A FakeCache with a real registry of texts."""

    def __init__(self, directory):
        super().__init__(directory)
        self.registry = PassageRegistry(directory)

    def prefill(self, passages, **options):
        self.registry.add(passage.text for passage in passages)
        return super().prefill(passages, **options)

    def register(self, texts):
        self.registry.add(texts)

    def forget(self, passages):
        passages = list(passages)
        self.registry.remove(passage.text for passage in passages)
        super().forget(passages)

    def close(self):
        self.registry.close()
        super().close()


def forms(passage):
    return [f"{passage.text} As it is shown elsewhere."]


def change_and_die(directory, num_events, results):
    """Change an index, and kill this process at the ``num_events``-th event in a function of ours."""
    count = 0

    def tick(frame, event, argument):
        nonlocal count
        if "rag_blockcache" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            count += 1
            if count == num_events:
                os.kill(os.getpid(), signal.SIGKILL)

    cache = RegisteringCache(directory)
    index = PrefilledIndex(directory, cache=cache, embedder=embed, other_forms=forms)
    sys.setprofile(tick)
    index.add([named(CAT, "a"), named(f"{CAT} New.", "n")])  # a: another text, n: new
    index.delete(["b"])
    index.add([named(BOB, "c")])  # what b was, under the name of another
    sys.setprofile(None)
    results.put(count)


BEFORE = {"a": ADA, "b": BOB, "c": CAT}
AFTER = {"a": {ADA, CAT}, "n": {f"{CAT} New."}, "b": {BOB}, "c": {CAT, BOB}}


def killed_at(directory, num_events):
    results = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(
        target=change_and_die, args=(directory, num_events, results)
    )
    process.start()
    process.join()
    return None if process.exitcode == -signal.SIGKILL else results.get()


def test_a_process_killed_at_any_moment_leaves_an_index_that_the_next_opening_puts_right(tmp_path):
    def begin(directory):
        with (
            closing(RegisteringCache(directory)) as cache,
            PrefilledIndex(directory, cache=cache, embedder=embed, other_forms=forms) as index,
        ):
            index.add([named(text, name) for name, text in BEFORE.items()])

    begin(tmp_path / "whole")
    num_events = killed_at(tmp_path / "whole", -1)
    moments = random.Random(0).sample(range(1, num_events), 30)
    for moment in moments:
        directory = tmp_path / str(moment)
        begin(directory)
        assert killed_at(directory, moment) is None
        with closing(RegisteringCache(directory)) as cache:
            with PrefilledIndex(directory, cache=cache, embedder=embed, other_forms=forms) as index:
                index.prefill()
                found = {passage.passage_id: passage.text for passage in index.get(list(index))}
            assert all(text in AFTER[name] for name, text in found.items()), moment
            assert {"a", "c"} <= set(found), moment
            possible = {text for texts in AFTER.values() for text in texts}
            possible |= {f"{text} As it is shown elsewhere." for text in possible}
            shown = {form for text in found.values() for form in (text, *forms(Passage(text)))}
            known = {text for text in possible if text in cache.registry}
            assert known == shown, moment  # of what was deleted or replaced no text stays
            assert set(cache.store) == {cache.block(Passage(text)).block_id for text in found.values()}, (
                moment
            )
            assert_whole(directory, cache)


def test_a_call_that_another_process_is_at_is_not_settled_under_its_hands(directory):
    with (
        closing(FakeCache(directory)) as cache,
        PrefilledIndex(directory, cache=cache, embedder=embed) as index,
    ):
        index.add([named(ADA, "a")])
        with sqlite3.connect(directory / "manifest.sqlite") as connection:
            connection.execute("UPDATE passages SET is_embedded = 0")
        connection.close()
        with (
            index_lock(directory, exclusive=False),
            closing(FakeCache(directory)) as second,
            PrefilledIndex(directory, cache=second, embedder=embed) as other,
        ):
            other.add([named(BOB, "b")])
        with closing(Manifest(directory)) as manifest:
            assert manifest.unfinished_passages() == ["a"]
    with (
        closing(FakeCache(directory)) as cache,
        PrefilledIndex(directory, cache=cache, embedder=embed) as index,
    ):
        index.prefill()
    with closing(Manifest(directory)) as manifest:
        assert manifest.unfinished_passages() == []
