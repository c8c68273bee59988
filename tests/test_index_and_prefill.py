"""The indexing job does what is left to do, once, and can be killed anywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import faiss
import pytest
from job_corpus import FakeCache, embed, run, run_and_die, splitter, state
from test_documents import pdf

from rag_blockcache import BlockCache
from rag_blockcache.errors import IndexMismatchError, InvalidInputError, OutOfSpaceError, StoreError
from rag_blockcache.jobs import indexing, prefilling
from rag_blockcache.jobs.extraction import EXTRACTORS
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.maintenance import verify
from rag_blockcache.manifest import Manifest
from rag_blockcache.passages import Passage
from rag_blockcache.retriever import Retriever

SHARED = "This licence is shared by all of them."


@pytest.fixture
def corpus(tmp_path):
    """Three documents; a passage in common, one passage each of their own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("ada", "bob", "cat"):
        write(folder / f"{name}.jsonl", f"About {name} there is a lot to say.", SHARED)
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def passages(out):
    return sorted(row[2] for row in state(out)["vectors"])


# What is done, and what is not done again


def test_documents_become_passages_vectors_and_blocks(corpus, out):
    report = run(out, [corpus])
    assert (report.num_new_documents, report.num_added_passages, report.num_encoded_blocks) == (3, 4, 4)
    assert report.num_shared_passages == 1
    assert report.num_bytes == 32 * report.num_tokens > 0
    assert passages(out) == [f"About {name} there is a lot to say." for name in ("ada", "bob", "cat")] + [
        SHARED
    ]
    assert len(state(out)["stored"]) == 4
    assert set(report.seconds) >= {"scan", "split", "embed", "prefill"}
    assert report.failures == ()


def test_a_second_run_does_nothing(corpus, out):
    run(out, [corpus])
    before = state(out)
    cache = FakeCache(out)
    report = run(out, [corpus], cache=cache)
    assert report.num_unchanged_documents == 3
    assert report.num_new_documents == report.num_added_passages == report.num_encoded_blocks == 0
    assert cache.encoded == []
    assert state(out) == before


def test_text_is_extracted_from_new_and_changed_documents_only(corpus, out, monkeypatch):
    extracted = []
    for suffix, extract in list(EXTRACTORS.items()):
        monkeypatch.setitem(
            EXTRACTORS,
            suffix,
            lambda data, name, extract=extract: extracted.append(Path(name).name) or extract(data, name),
        )
    (corpus / "page.pdf").write_bytes(pdf("A page that takes long to parse."))
    run(out, [corpus])
    assert sorted(extracted) == ["ada.jsonl", "bob.jsonl", "cat.jsonl", "page.pdf"]
    extracted.clear()
    assert run(out, [corpus]).num_unchanged_documents == 4
    assert extracted == []
    write(corpus / "bob.jsonl", "Bob is somebody else now.")
    run(out, [corpus], dry_run=True)
    assert extracted == ["bob.jsonl"]


def test_a_shard_extracts_text_from_its_own_documents_only(corpus, out, monkeypatch):
    extracted = []
    extract = EXTRACTORS[".jsonl"]
    monkeypatch.setitem(
        EXTRACTORS, ".jsonl", lambda data, name: extracted.append(name) or extract(data, name)
    )
    reports = [run(out, [corpus], shard=(shard, 2)) for shard in (1, 2)]
    assert sum(report.num_new_documents for report in reports) == len(extracted) == 3


def test_a_shared_passage_is_encoded_once_counted_twice_and_stays_while_anyone_holds_it(corpus, out):
    cache = FakeCache(out)
    run(out, [corpus], cache=cache)
    assert len(cache.encoded) == len(set(cache.encoded)) == 4
    (corpus / "ada.jsonl").unlink()
    report = run(out, [corpus])
    assert (report.num_gone_documents, report.num_removed_passages, report.num_dropped_blocks) == (1, 1, 1)
    assert SHARED in passages(out)
    (corpus / "bob.jsonl").unlink()
    write(corpus / "cat.jsonl", "About cat there is a lot to say.")
    last = FakeCache(out)
    assert run(out, [corpus], cache=last).num_removed_passages == 2
    assert sorted(last.forgotten) == ["About bob there is a lot to say.", SHARED]
    assert passages(out) == ["About cat there is a lot to say."]
    assert len(state(out)["stored"]) == 1


def sources(out, text):
    return [json.loads(row[3])["source"] for row in state(out)["vectors"] if row[2] == text]


def test_a_shared_passage_always_names_a_document_that_holds_it(corpus, out):
    run(out, [corpus])
    assert sources(out, SHARED) == [str(corpus / "ada.jsonl")]
    write(corpus / "ada.jsonl", "Ada has no licence any more.")
    run(out, [corpus])
    assert sources(out, SHARED) == [str(corpus / "bob.jsonl")]
    (corpus / "bob.jsonl").unlink()
    run(out, [corpus])
    assert sources(out, SHARED) == [str(corpus / "cat.jsonl")]
    write(corpus / "cat.jsonl", "Nor has Cat.")
    write(corpus / "dan.jsonl", SHARED)  # takes it over in the same commit
    run(out, [corpus])
    assert sources(out, SHARED) == [str(corpus / "dan.jsonl")]


def test_only_the_changed_passage_of_a_changed_document_is_done(corpus, out):
    run(out, [corpus])
    write(corpus / "bob.jsonl", "Bob is somebody else now.", SHARED)
    cache = FakeCache(out)
    report = run(out, [corpus], cache=cache)
    assert (report.num_changed_documents, report.num_unchanged_documents) == (1, 2)
    assert (report.num_added_passages, report.num_removed_passages) == (1, 1)
    assert len(cache.encoded) == 1
    assert "About bob there is a lot to say." not in passages(out)


def test_a_renamed_document_keeps_its_blocks(corpus, out):
    run(out, [corpus])
    (corpus / "ada.jsonl").rename(corpus / "zoe.jsonl")
    cache = FakeCache(out)
    report = run(out, [corpus], cache=cache)
    assert (report.num_new_documents, report.num_gone_documents) == (1, 1)
    assert (report.num_added_passages, report.num_removed_passages, cache.encoded) == (0, 0, [])


def test_a_passage_that_moves_between_documents_keeps_its_block(corpus, out, monkeypatch):
    monkeypatch.setattr(indexing, "_GROUP", 1)
    run(out, [corpus])
    write(corpus / "ada.jsonl", SHARED)
    write(corpus / "cat.jsonl", "About ada there is a lot to say.", SHARED)
    cache = FakeCache(out)
    run(out, [corpus], cache=cache)
    assert cache.encoded == []
    assert "About ada there is a lot to say." in passages(out)


def test_documents_from_elsewhere_stay(corpus, out, tmp_path):
    other = tmp_path / "corpus-two"  # begins with the name of the first
    other.mkdir()
    write(other / "dan.jsonl", "Dan lives elsewhere.")
    run(out, [corpus])
    assert run(out, [other]).num_gone_documents == 0
    assert len(passages(out)) == 5
    (other / "dan.jsonl").unlink()
    write(other / "eve.jsonl", "Eve does too.")
    assert run(out, [other]).num_gone_documents == 1


def test_an_empty_folder_is_an_error_and_empties_nothing(corpus, out):
    run(out, [corpus])
    before = state(out)
    for path in corpus.iterdir():
        path.unlink()
    with pytest.raises(InvalidInputError, match="no document"):
        run(out, [corpus])
    assert state(out) == before


@pytest.mark.parametrize(("num_documents", "kind"), [(100, "IndexFlatIP"), (400, "IndexIVFFlat")])
def test_an_index_that_must_be_trained_grows_through_the_job(corpus, out, monkeypatch, num_documents, kind):
    monkeypatch.setattr(indexing, "_GROUP", 30)  # fewer than it takes to train
    for number in range(num_documents):
        write(
            corpus / f"{number}.jsonl", f"Document {number} says {'e' * (number % 50)} {'a' * (number % 20)}."
        )
    report = run(out, [corpus], index_factory="IVF8,Flat", prefill="none")
    assert (report.num_added_passages, report.failures) == (num_documents + 4, ())
    (saved,) = (out / "index").glob("*.faiss")
    assert type(faiss.downcast_index(faiss.read_index(str(saved)).index)).__name__ == kind
    run(out / "flat", [corpus], prefill="none")
    with (
        closing(Retriever(out / "index", embedder=embed)) as retriever,
        closing(Retriever(out / "flat" / "index", embedder=embed)) as exact,
    ):
        assert retriever.index_factory == "IVF8,Flat"
        assert retriever.verify() == []
        assert retriever.search("Who says aaa?", 3)[0].score == exact.search("Who says aaa?", 3)[0].score
    assert run(out, [corpus], prefill="none").num_unchanged_documents == num_documents + 3


# What to prefill


def test_prefill_none_indexes_and_leaves_the_blocks_pending(corpus, out):
    report = run(out, [corpus], prefill="none")
    assert (report.num_encoded_blocks, report.num_pending_blocks) == (0, 4)
    assert state(out)["stored"] == {}
    assert run(out, [corpus]).num_encoded_blocks == 4


def test_the_hottest_are_those_that_most_documents_hold(corpus, out):
    report = run(out, [corpus], prefill=1)
    assert (report.num_encoded_blocks, report.num_pending_blocks) == (1, 3)
    assert list(state(out)["stored"]) == [FakeCache(out).block(Passage(SHARED)).block_id]
    assert run(out, [corpus], prefill=1).num_encoded_blocks == 0  # not the next one


def test_the_hottest_are_those_that_most_queries_used_too(corpus, out):
    used = FakeCache(out).block(Passage("About bob there is a lot to say.")).block_id
    run(out, [corpus], prefill=1, usage={used: 9})
    assert list(state(out)["stored"]) == [used]


def test_what_was_used_before_is_hot_without_being_told(corpus, out):
    run(out, [corpus], prefill="none")
    with closing(FakeCache(out)) as cache:
        used = cache.block(Passage("About bob there is a lot to say."))
        cache.prefill([Passage("About bob there is a lot to say.")])  # as an answer would have stored it
        assert cache.store.get(used.block_id) is not None
    report = run(out, [corpus], prefill=1)
    assert (report.num_encoded_blocks, report.num_skipped_blocks) == (0, 1)
    assert list(state(out)["stored"]) == [used.block_id]
    assert run(out, [corpus], prefill=2).num_encoded_blocks == 1
    assert FakeCache(out).block(Passage(SHARED)).block_id in state(out)["stored"]  # most documents hold it


def test_large_groups_go_to_the_encoder_longest_first(corpus, out):
    groups = []
    cache = FakeCache(out)
    encode = cache.prefill
    cache.prefill = lambda texts, **options: (
        groups.append([len(p.text) for p in texts]) or encode(texts, **options)
    )
    run(out, [corpus], cache=cache)
    assert groups == [[38, 32, 32, 32]]


@pytest.mark.parametrize("prefill", ["some", 0, -1])
def test_what_cannot_be_chosen_is_refused(corpus, out, prefill):
    with pytest.raises(InvalidInputError, match="prefill is"):
        run(out, [corpus], prefill=prefill)


def test_a_dry_run_says_what_the_run_then_does_and_changes_nothing(corpus, out):
    run(out, [corpus])
    (corpus / "ada.jsonl").unlink()
    write(corpus / "bob.jsonl", "Bob is somebody else now.")
    write(corpus / "dan.jsonl", "Dan is new.", SHARED)
    before = state(out)
    planned = run(out, [corpus], dry_run=True)
    assert planned.is_dry_run
    assert state(out) == before
    done = run(out, [corpus])
    counted = [name for name in vars(done) if name.startswith("num_")]
    assert {name: getattr(planned, name) for name in counted} == {
        name: getattr(done, name) for name in counted
    }


# What cannot be done


def test_an_unreadable_document_is_reported_and_does_not_stop_the_rest(corpus, out):
    (corpus / "bad.txt").write_bytes(b"\xff\xfe\xff half a \x00 text \xff")
    report = run(out, [corpus])
    assert report.num_failed_documents == 1
    assert "bad.txt" in report.failures[0].source
    assert report.num_new_documents == 3


def test_a_document_that_cannot_be_read_any_more_keeps_its_passages(corpus, out):
    (corpus / "note.txt").write_text("A note about everything.")
    run(out, [corpus])
    (corpus / "note.txt").write_bytes(b"\xff\xfe\xff half a \x00 text \xff")
    report = run(out, [corpus])
    assert (report.num_failed_documents, report.num_gone_documents) == (1, 0)
    assert "A note about everything." in passages(out)


def test_a_line_that_cannot_be_used_is_reported_in_every_run(corpus, out):
    (corpus / "half.jsonl").write_text('{"text": "A good line."}\n{"text": \n')
    for _ in range(2):  # the second one does not read the file again
        report = run(out, [corpus])
        (failure,) = report.failures
        assert "half.jsonl" in failure.source
        assert failure.reason.startswith("line 2: ")
        assert report.num_failed_documents == 1
    assert "A good line." in passages(out)


def test_a_passage_longer_than_the_window_is_reported_in_every_run(corpus, out):
    write(corpus / "long.jsonl", "Short enough.", "long " * 100)
    for _ in range(2):
        report = run(out, [corpus])
        (failure,) = report.failures
        assert "long.jsonl" in failure.source
        assert "passage 2: it has 501 tokens" in failure.reason
        assert "window of 400" in failure.reason
    assert "Short enough." in passages(out)


def test_a_passage_that_cannot_be_stored_is_reported_and_does_not_stop_the_rest(corpus, out):
    (corpus / "odd.jsonl").write_text('{"text": "half a character: \\ud800"}\n{"text": "A whole one."}\n')
    report = run(out, [corpus])
    assert len(report.failures) == 1
    assert "A whole one." in passages(out)


def test_another_model_embedder_or_splitting_is_refused(corpus, out):
    run(out, [corpus])
    before = state(out)
    with pytest.raises(IndexMismatchError, match=r"models/fake .*not the model models/other"):
        run(out, [corpus], cache=FakeCache(out, fingerprint="other"))
    with pytest.raises(IndexMismatchError, match=r"passages of up to 60 tokens.*not passages of up to 30"):
        run(out, [corpus], splitter=type(splitter())(splitter_tokenizer(), max_tokens=30))
    assert state(out) == before


def splitter_tokenizer():
    from conftest import byte_tokenizer

    return byte_tokenizer()


def test_a_full_disk_leaves_what_was_committed_and_the_next_run_does_the_rest(corpus, out, monkeypatch):
    monkeypatch.setattr(prefilling, "_GROUP", 2)
    cache = FakeCache(out)
    put = cache.store.put

    def fill_up(block_id, states, **options):
        if len(cache.encoded) == 3:
            raise OutOfSpaceError("the disk is full; free some")
        return put(block_id, states, **options)

    cache.store.put = fill_up
    with pytest.raises(OutOfSpaceError):
        run(out, [corpus], cache=cache)
    assert len(state(out)["stored"]) == 3
    report = run(out, [corpus])
    assert (report.num_encoded_blocks, report.num_skipped_blocks) == (
        1,
        1,
    )  # one was stored but not on record
    assert report.num_pending_blocks == 0


def test_blocks_without_room_in_the_disk_budget_are_reported_and_pending_until_it_is_larger(
    corpus, out, monkeypatch
):
    monkeypatch.setattr(prefilling, "_GROUP", 2)
    for _ in range(2):  # the second one finds the budget full, and encodes nothing only to evict it
        cache = FakeCache(out, disk_budget_bytes=2 * (4096 + 32 * 45))
        report = run(out, [corpus], cache=cache)
        (failure,) = report.failures
        assert failure.source == str(out / "blocks")
        assert "2 blocks were not stored: the disk budget of 11,072 bytes has no room" in failure.reason
        assert (report.num_not_stored_blocks, report.num_pending_blocks) == (2, 2)
        assert len(state(out)["stored"]) == 2
        assert sum(is_done for *_, is_done in state(out)["blocks"]) == 2
    assert cache.encoded == []
    report = run(out, [corpus], cache=FakeCache(out, disk_budget_bytes=10**6))
    assert (report.num_encoded_blocks, report.num_pending_blocks, report.failures) == (2, 0, ())
    assert len(state(out)["stored"]) == 4


def test_a_budget_for_no_block_at_all_still_makes_an_index_that_answers(
    tiny_model, tiny_tokenizer, corpus, out
):
    with closing(BlockCache(tiny_model, out, tokenizer=tiny_tokenizer, disk_budget_bytes=4096)) as cache:
        report = run(out, [corpus], cache=cache)
    assert (report.num_encoded_blocks, report.num_not_stored_blocks, report.num_pending_blocks) == (0, 4, 4)
    assert len(report.failures) == 1
    with (
        closing(BlockCache(tiny_model, out, tokenizer=tiny_tokenizer, disk_budget_bytes=4096)) as cache,
        closing(Retriever(out / "index", embedder=embed)) as retriever,
        closing(BlockCache(tiny_model, None, tokenizer=tiny_tokenizer)) as other,
    ):
        found = [result.passage for result in retriever.search("Who is Ada?", k=4)]
        answer = cache.generate("Who is Ada?", found, max_new_tokens=4, policy="block")
        assert answer.num_misses == 4
        assert (
            answer.token_ids
            == other.generate("Who is Ada?", found, max_new_tokens=4, policy="block").token_ids
        )
    # The budget is on record; a larger one takes its place.
    with closing(BlockCache(tiny_model, out, tokenizer=tiny_tokenizer, disk_budget_bytes=10**9)) as cache:
        report = run(out, [corpus], cache=cache)
    assert (report.num_encoded_blocks, report.num_pending_blocks, report.failures) == (4, 0, ())


def test_a_job_waits_for_nobody_who_needs_the_index_alone(corpus, out):
    with index_lock(out, exclusive=True), pytest.raises(StoreError, match="another job is at work"):
        run(out, [corpus])


def test_a_passage_that_the_retriever_lost_is_reported_and_found_again_by_the_next_run(corpus, out):
    run(out, [corpus], prefill="none")
    with closing(Retriever(out / "index")) as retriever:
        retriever.delete([Passage(SHARED).content_id])
    report = run(out, [corpus])
    assert "is missing from the index; run the same command again" in report.failures[0].reason
    report = run(out, [corpus])
    assert report.failures == ()
    assert SHARED in passages(out)
    assert len(state(out)["stored"]) == 4


# Progress and interruption


def test_progress_tells_every_stage_to_its_end(corpus, out):
    told = {}
    run(out, [corpus], progress=lambda progress: told.__setitem__(progress.stage, progress))
    assert told["scan"].num_done == 3
    assert told["split"].num_done == 3
    assert told["embed"].num_done == 4
    assert (told["prefill"].num_done, told["prefill"].num_total) == (4, 4)
    assert told["prefill"].num_tokens > 0


@pytest.mark.parametrize("stage", ["scan", "split", "embed", "prefill"])
def test_an_interruption_loses_nothing(corpus, out, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_GROUP", 2)
    run(tmp_path / "whole", [corpus])

    def interrupt(progress):
        if progress.stage == stage and progress.num_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, [corpus], progress=interrupt)
    run(out, [corpus])
    assert state(out) == state(tmp_path / "whole")


KILLS = multiprocessing.get_context("forkserver")
KILLS.set_forkserver_preload(["rag_blockcache.block_cache", "rag_blockcache.retriever"])


def _in_a_process(out, corpus, num_events):
    results = KILLS.SimpleQueue()
    worker = KILLS.Process(target=run_and_die, args=(out, [corpus], num_events, results))
    worker.start()
    worker.join()
    return worker.exitcode, results


def test_a_job_killed_at_any_moment_and_run_again_ends_as_if_it_had_not_been(corpus, tmp_path):
    first = tmp_path / "first"
    run(first, [corpus])
    (corpus / "ada.jsonl").unlink()
    write(corpus / "bob.jsonl", "Bob is somebody else now.", "And says so.")
    write(corpus / "dan.jsonl", "Dan is new.", SHARED)
    whole = tmp_path / "whole"
    shutil.copytree(first, whole)
    exit_code, results = _in_a_process(whole, corpus, num_events=0)
    assert exit_code == 0
    num_events = results.get()
    expected = state(whole)
    chosen = random.Random(0)
    for number in range(24):
        moment = num_events * number // 24 + chosen.randrange(1, num_events // 24)
        out = tmp_path / f"killed-{moment}"
        shutil.copytree(first, out)
        exit_code, _ = _in_a_process(out, corpus, moment)
        assert exit_code == -signal.SIGKILL
        run(out, [corpus])
        assert state(out) == expected, f"killed at event {moment} of {num_events}"


# Shards


def test_shards_share_the_documents_and_one_directory(corpus, out, tmp_path):
    for number in range(20):
        write(corpus / f"{number}.jsonl", f"Document number {number}.", SHARED)
    run(tmp_path / "whole", [corpus])
    failures = []

    def work(shard):
        try:
            run(out, [corpus], shard=shard)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=((shard, 3),)) for shard in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    whole, sharded = state(tmp_path / "whole"), state(out)
    (metadata,) = (json.loads(row[3]) for row in sharded["vectors"] if row[2] == SHARED)
    assert metadata["index"] == 1
    with closing(Manifest(out)) as manifest:  # which of them depends on the shard that came first
        assert metadata["source"] in manifest.documents_of(Passage(SHARED).content_id)
    for found in (whole, sharded):
        found["vectors"] = [row for row in found["vectors"] if row[2] != SHARED]
    assert sharded == whole


def test_a_shard_removes_only_its_own_gone_documents(corpus, out):
    for number in range(20):
        write(corpus / f"{number}.jsonl", f"Document number {number}.")
    run(out, [corpus])
    for number in range(20):
        (corpus / f"{number}.jsonl").unlink()
    gone = [run(out, [corpus], shard=(shard, 2)).num_gone_documents for shard in (1, 2)]
    assert sum(gone) == 20
    assert all(gone)


def test_shards_may_have_a_directory_each(corpus, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    reports = [run(out, [corpus], shard=(shard, 2)) for shard, out in enumerate(outs, 1)]
    assert sum(report.num_new_documents for report in reports) == 3
    with closing(Manifest(outs[0])) as one, closing(Manifest(outs[1])) as two:
        assert one.counts().num_documents + two.counts().num_documents == 3


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_shard_that_does_not_exist_is_refused(corpus, out, shard):
    with pytest.raises(InvalidInputError, match="shard is"):
        run(out, [corpus], shard=shard)


# With the engine itself


def test_passages_that_the_job_prefilled_are_reused_in_answers(tiny_model, tiny_tokenizer, corpus, out):
    cache = BlockCache(tiny_model, out, tokenizer=tiny_tokenizer)
    report = run(out, [corpus], cache=cache)
    assert report.num_encoded_blocks == 4
    assert report.num_bytes == report.num_tokens * cache.model.kv_bytes_per_token
    with (
        closing(BlockCache(tiny_model, out, tokenizer=tiny_tokenizer)) as cache,
        closing(Retriever(out / "index", embedder=embed)) as retriever,
        closing(Manifest(out)) as manifest,
    ):
        found = [result.passage for result in retriever.search("Who is Ada?", k=3)]
        answer = cache.generate("Who is Ada?", found, max_new_tokens=2, policy="block")
        assert (answer.num_hits, answer.num_misses) == (3, 0)
        assert verify(cache=cache, retriever=retriever, manifest=manifest).is_sound


STOPPED_IN_PREFILL = """
import sys
from pathlib import Path
from job_corpus import run
from rag_blockcache import BlockCache

def wait(progress):
    if progress.stage == "prefill" and progress.num_tokens:
        print("encoding", flush=True)
        sys.stdin.read()

model, out, corpus = map(Path, sys.argv[1:])
run(out, [corpus], cache=BlockCache(model, out), progress=wait)
"""


def test_a_process_killed_while_it_encodes_leaves_an_index_that_the_next_one_finishes(
    tiny_model_path, corpus, out
):
    for number in range(60):
        write(corpus / f"{number}.jsonl", f"Document number {number} says {'this and that ' * 8}.")
    arguments = [sys.executable, "-c", STOPPED_IN_PREFILL, tiny_model_path, out, corpus]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(arguments, env=environment, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == b"encoding\n", process.communicate()[1].decode()
        process.kill()
    stored = len(state(out)["stored"])
    assert 0 < stored < 64
    report = run(out, [corpus], cache=BlockCache(tiny_model_path, out))
    assert report.num_unchanged_documents == 63
    assert report.num_encoded_blocks == 64 - stored  # nothing is encoded twice
    assert report.num_pending_blocks == 0
    assert len(state(out)["stored"]) == 64
