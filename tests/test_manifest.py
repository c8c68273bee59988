"""The manifest counts references right, loses nothing, and refuses what is not its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_blockcache.errors import IndexMismatchError, OutOfSpaceError, StoreError
from rag_blockcache.index_records import (
    DocumentRecord,
    IndexSettings,
    PassageRecord,
    PassageState,
    Released,
)
from rag_blockcache.manifest import Manifest, is_in_shard

SETTINGS = IndexSettings("tiny", "f00", "minilm", "paper", "512 tokens")


def passage(name: str) -> PassageRecord:
    """Two passages that differ in case only share a block, as two renderings with equal tokens do."""
    return PassageRecord(name, f"block-{name.lower()}", num_tokens=10 + ord(name[0].lower()))


def document(name: str, passages: str, content_hash: str = "1") -> DocumentRecord:
    return DocumentRecord(name, content_hash, tuple(passage(letter) for letter in passages))


@pytest.fixture
def manifest(tmp_path):
    manifest = Manifest(tmp_path)
    yield manifest
    manifest.close()


def finish(manifest: Manifest) -> None:
    for page in manifest.passages():
        manifest.mark_embedded([state.passage_id for state in page])
        manifest.mark_done([state.block_id for state in page])


def states(manifest: Manifest):
    return {state.passage_id: state for page in manifest.passages(page=2) for state in page}


def test_a_new_document_is_new_until_its_vectors_are_saved_and_then_unchanged(manifest):
    manifest.start_scan()
    assert manifest.classify("d", "1") == "new"
    manifest.replace_documents([document("d", "ab")])
    assert manifest.classify("d", "1") == "changed"  # a killed job left its vectors unsaved
    manifest.mark_embedded(["a", "b"])
    assert manifest.classify("d", "1") == "unchanged"
    assert manifest.classify("d", "2") == "changed"


def test_documents_that_a_scan_did_not_see_are_gone(manifest):
    manifest.replace_documents([document("d", "a"), document("e", "b")])
    manifest.start_scan()
    manifest.classify("d", "1")
    assert manifest.gone() == ["e"]
    manifest.see("e")
    assert manifest.gone() == []


def test_shards_split_the_gone_documents_between_them(manifest):
    names = [f"d{index}" for index in range(50)]
    manifest.replace_documents([document(name, "a") for name in names])
    gone = [manifest.gone(shard=(shard, 3)) for shard in (1, 2, 3)]
    assert sorted(chain.from_iterable(gone)) == sorted(names)
    assert all(is_in_shard(name, (shard + 1, 3)) for shard in range(3) for name in gone[shard])
    assert all(gone)


def test_what_a_document_lost_is_released_unless_another_one_holds_it(manifest):
    manifest.replace_documents([document("d", "abc"), document("e", "bC")])
    finish(manifest)
    assert manifest.replace_documents([document("d", "x", "2")]) == Released(
        frozenset("ac"), frozenset({"block-a"})
    )  # b is held by e, and block-c by its passage C
    assert manifest.documents_of("b") == ["e"]
    assert states(manifest)["C"].is_done


def test_a_passage_that_comes_back_before_it_was_dropped_is_worked_on_again(manifest):
    manifest.replace_documents([document("d", "a")])
    finish(manifest)
    manifest.remove_documents(["d"])
    manifest.replace_documents([document("e", "a")])
    assert manifest.unembedded(["a"]) == {"a"}
    assert [block.block_id for block in manifest.pending(10)] == ["block-a"]


def test_claims_on_what_nobody_holds_any_more_are_not_recorded(manifest):
    manifest.replace_documents([document("d", "a")])
    manifest.remove_documents(["d"])
    manifest.mark_embedded(["a"])
    manifest.mark_done(["block-a"])
    dropped: list[str] = []
    assert manifest.drop_passages(dropped.extend) == 1
    assert manifest.drop_blocks(dropped.extend) == 1
    assert dropped == ["a", "block-a"]


def test_a_passage_put_by_name_is_worked_on_again_whenever_it_is_put(manifest):
    first, second = PassageRecord("p", "block-1", 10), PassageRecord("p", "block-2", 12)
    assert manifest.put_passages([(first, "content 1")]) == Released()
    assert manifest.unfinished_passages() == ["p"]
    finish(manifest)
    assert manifest.unfinished_passages() == []
    assert states(manifest)["p"].content_id == "content 1"
    assert manifest.put_passages([(second, "content 2")]) == Released(blocks=frozenset({"block-1"}))
    assert manifest.unfinished_passages() == ["p"]
    assert states(manifest)["p"] == PassageState("p", "content 2", "block-2", 12, 1, False, False)
    dropped: list[str] = []
    assert manifest.drop_blocks(dropped.extend) == 1
    assert dropped == ["block-1"]


def test_a_block_that_another_passage_needs_stays_when_a_name_gets_other_content(manifest):
    shared = [PassageRecord(name, "block-1", 10) for name in "pq"]
    manifest.put_passages([(record, "content") for record in shared])
    finish(manifest)
    assert manifest.put_passages([(PassageRecord("p", "block-2", 10), "other")]) == Released()
    assert manifest.needed_blocks(["block-1", "block-2", "block-3"]) == {"block-1", "block-2"}
    assert manifest.remove_passages(["q", "not there"]) == Released(frozenset("q"), frozenset({"block-1"}))
    assert manifest.needed_blocks(["block-1", "block-2"]) == {"block-2"}


def test_removing_passages_takes_them_out_of_every_document(manifest):
    manifest.replace_documents([document("d", "abc"), document("e", "b")])
    manifest.put_passages([(passage("b"), "content")])
    finish(manifest)
    assert manifest.remove_passages(["b"]) == Released(frozenset("b"), frozenset({"block-b"}))
    assert (manifest.passages_of("d"), manifest.passages_of("e")) == (["a", "c"], [])
    assert manifest.documents_of("b") == []
    assert manifest.counts().num_documents == 2  # files stay, empty or not; what stood for b alone is gone
    assert set(states(manifest)) == {"a", "c"}


def test_a_scan_over_files_leaves_passages_put_by_name_where_they_are(manifest):
    manifest.put_passages([(passage("a"), "content")])
    manifest.replace_documents([document("/docs/d", "ab")])
    finish(manifest)
    assert manifest.remove_documents(["/docs/d"]) == Released(frozenset("b"), frozenset({"block-b"}))
    assert set(states(manifest)) == {"a"}


def test_what_could_not_be_deleted_stays_on_record(manifest):
    manifest.replace_documents([document("d", "a")])
    manifest.remove_documents(["d"])

    def fail(ids):
        raise OutOfSpaceError("the disk is full")

    with pytest.raises(OutOfSpaceError):
        manifest.drop_passages(fail)
    assert manifest.drop_passages(lambda ids: None) == 1
    assert manifest.drop_passages(lambda ids: None) == 0


def test_a_passage_twice_in_one_document_counts_once(manifest):
    manifest.replace_documents([document("d", "aba")])
    assert states(manifest)["a"].num_documents == 1
    assert manifest.passages_of("d") == ["a", "b", "a"]
    assert manifest.counts().num_shared_passages == 0


def test_pending_blocks_come_longest_first_page_by_page_until_done(manifest):
    manifest.replace_documents([document("d", "abcd")])
    first = manifest.pending(3)
    assert [block.passage_id for block in first] == ["d", "c", "b"]
    assert [block.passage_id for block in manifest.pending(3, after=first[-1])] == ["a"]
    manifest.mark_done(block.block_id for block in first)
    assert [block.passage_id for block in manifest.pending(3)] == ["a"]
    assert manifest.num_pending() == (1, passage("a").num_tokens)


def test_the_hottest_blocks_are_those_used_most_and_among_equals_those_of_most_documents(manifest):
    manifest.replace_documents([document("d", "abc"), document("e", "bc"), document("f", "c")])
    manifest.choose_hottest(1)
    assert [block.passage_id for block in manifest.pending(9, only_chosen=True)] == ["c"]
    manifest.choose_hottest(1, usage={"block-a": 1, "block-b": 1})
    assert [block.passage_id for block in manifest.pending(9, only_chosen=True)] == ["b"]
    manifest.choose_hottest(1, usage={"block-a": 2, "block-b": 1})
    assert [block.passage_id for block in manifest.pending(9, only_chosen=True)] == ["a"]
    manifest.mark_done(["block-a"])
    assert manifest.num_pending(only_chosen=True) == (0, 0)  # not the next one instead


def test_pending_blocks_of_all_shards_are_all_pending_blocks(manifest):
    manifest.replace_documents([document(f"d{index}", "abcdefgh"[index]) for index in range(8)])
    shards = [{block.block_id for block in manifest.pending(9, shard=(shard, 2))} for shard in (1, 2)]
    assert shards[0] | shards[1] == {block.block_id for block in manifest.pending(9)}
    assert not shards[0] & shards[1]
    assert all(shards)


def test_refused_parts_stay_on_record_with_their_document(manifest):
    manifest.replace_documents([replace(document("d", "a"), refusals=("too long",))])
    assert list(manifest.refusals()) == [("d", "too long")]
    manifest.remove_documents(["d"])
    assert list(manifest.refusals()) == []


def test_missing_vectors_and_blocks_are_made_again(manifest):
    manifest.replace_documents([document("d", "ab")])
    finish(manifest)
    manifest.mark_lost(passage_ids=["a"], block_ids=["block-b"])
    assert manifest.classify("d", "1") == "changed"
    assert [block.passage_id for block in manifest.pending(9)] == ["b"]


def test_a_passage_whose_block_has_another_name_by_now_is_encoded_again(manifest):
    manifest.replace_documents([document("d", "a")])
    finish(manifest)
    manifest.replace_documents([DocumentRecord("d", "1", (PassageRecord("a", "renamed", 7),))])
    assert [block.block_id for block in manifest.pending(9)] == ["renamed"]
    dropped: list[str] = []
    manifest.drop_blocks(dropped.extend)
    assert dropped == ["block-a"]


def test_a_copy_changes_and_the_original_does_not(manifest, tmp_path):
    manifest.replace_documents([document("d", "a")])
    copy = manifest.copy_to(tmp_path / "elsewhere")
    copy.remove_documents(["d"])
    copy.close()
    assert manifest.passages_of("d") == ["a"]


def test_counts_tell_what_there_is_and_what_is_left(manifest):
    manifest.replace_documents([document("d", "aA"), document("e", "ab")])
    manifest.mark_embedded("a")
    manifest.mark_done(["block-b"])
    counts = manifest.counts()
    assert (counts.num_documents, counts.num_passages, counts.num_shared_passages) == (2, 3, 1)
    assert (counts.num_blocks, counts.num_pending_passages, counts.num_pending_blocks) == (2, 2, 1)
    assert counts.num_tokens == passage("a").num_tokens + passage("b").num_tokens
    assert counts.num_pending_tokens == passage("a").num_tokens


def test_settings_are_recorded_once_and_checked_ever_after(manifest):
    assert manifest.settings is None
    manifest.adopt(SETTINGS)
    manifest.adopt(replace(SETTINGS, model="the/same/model/elsewhere"))
    assert manifest.settings == SETTINGS


@pytest.mark.parametrize(
    ("name", "before"), [("fingerprint", "f00"), ("embedder", "minilm"), ("passage_format", "paper")]
)
def test_other_settings_are_refused_naming_both(manifest, name, before):
    manifest.adopt(SETTINGS)
    with pytest.raises(IndexMismatchError, match=rf"{before}.*not.*another-one.*choose another directory"):
        manifest.adopt(replace(SETTINGS, **{name: "another-one"}))


def test_what_blocks_attend_to_is_recorded_and_another_is_refused(manifest):
    conditioned = replace(SETTINGS, blocks_see="preamble", preamble="Be brief.")
    manifest.adopt(conditioned)
    assert manifest.settings == conditioned
    for other, message in (
        (
            SETTINGS,
            "blocks_see='preamble' and the preamble 'Be brief.', not blocks_see='themselves'",
        ),
        (replace(conditioned, preamble="Be long."), "'Be brief.', not .*'Be long.'"),
    ):
        with pytest.raises(IndexMismatchError, match=message):
            manifest.adopt(other)


@pytest.mark.parametrize(("recorded", "meant"), [("0", "themselves"), ("1", "preamble")])
def test_an_index_from_before_stand_ins_says_what_its_blocks_see(recorded, meant, manifest):
    manifest.adopt(replace(SETTINGS, preamble="Be brief."))
    with closing(sqlite3.connect(manifest.path)) as connection, connection:
        connection.execute(
            "UPDATE settings SET name = 'condition_on_preamble', value = ? WHERE name = 'blocks_see'",
            [recorded],
        )
    assert manifest.settings.blocks_see == meant
    manifest.adopt(replace(SETTINGS, preamble="Be brief.", blocks_see=meant))
    with pytest.raises(IndexMismatchError, match=f"made with blocks_see='{meant}'.*, not .*'stand-ins'"):
        manifest.adopt(replace(SETTINGS, preamble="Be brief.", blocks_see="stand-ins"))


def test_blocks_that_see_themselves_do_not_mind_another_preamble(manifest):
    manifest.adopt(replace(SETTINGS, preamble="Be brief."))
    manifest.adopt(replace(SETTINGS, preamble="Be long."))


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "manifest.sqlite").write_bytes(b"hello, this is not a database at all" * 100)
    with pytest.raises(StoreError, match=r"manifest\.sqlite is damaged or not a database.*choose another"):
        Manifest(tmp_path)


def test_a_database_of_another_program_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "manifest.sqlite") as connection:
        connection.execute("CREATE TABLE theirs (id INTEGER)")
    connection.close()
    with pytest.raises(StoreError, match="another program"):
        Manifest(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    Manifest(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "manifest.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"format version 99.*install a newer rag_blockcache"):
        Manifest(tmp_path)


def test_damage_inside_the_file_is_an_error_of_ours(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.replace_documents([document(f"document-{index}" * 20, "abc") for index in range(300)])
    manifest.close()
    path = tmp_path / "manifest.sqlite"
    content = bytearray(path.read_bytes())
    content[4096 * 4 : 4096 * 30] = b"\xab" * (4096 * 26)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        list(Manifest(tmp_path).passages())


def test_a_full_disk_is_told_as_such_and_nothing_is_lost(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.replace_documents([document("d", "a")])
    manifest._database.execute("PRAGMA max_page_count = 1")  # SQLite clips it to the present size
    with pytest.raises(OutOfSpaceError, match="free some and run the same command again"):
        manifest.replace_documents([document(f"document-{index}", "xyz") for index in range(2000)])
    assert manifest.passages_of("d") == ["a"]
    assert manifest.counts().num_documents == 1


def _die_inside_a_transaction(directory: Path) -> None:
    manifest = Manifest(directory)
    manifest.replace_documents([document("kept", "a")])
    manifest.remove_documents(["kept"])
    manifest.drop_passages(lambda ids: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_killed_inside_a_transaction_leaves_the_state_before_it(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=_die_inside_a_transaction, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert Manifest(tmp_path).drop_passages(lambda ids: None) == 1


def _add_documents(directory: Path, shard: int) -> None:
    manifest = Manifest(directory)
    for index in range(20):
        manifest.replace_documents([document(f"{shard}-{index}", "abc")])
    manifest.close()


def test_processes_may_open_and_write_one_directory_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_documents, args=(tmp_path, shard)) for shard in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert Manifest(tmp_path).counts().num_documents == 80


class Model:
    """The manifest as plain dictionaries."""

    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.embedded: set[str] = set()
        self.done: set[str] = set()

    def holders(self) -> dict[str, set[str]]:
        holders = defaultdict(set)
        for name, passages in self.documents.items():
            for letter in passages:
                holders[letter].add(name)
        return holders

    def change(self, edits: dict[str, str | None]) -> Released:
        before = self.holders()
        for name, passages in edits.items():
            self.documents.pop(name, None)
            if passages is not None:
                self.documents[name] = passages
        held = self.holders()
        needed = {passage(letter).block_id for letter in held}
        lost = {letter for letter in before if letter not in held}
        self.embedded -= lost
        self.done &= needed
        return Released(frozenset(lost), frozenset(passage(letter).block_id for letter in lost) - needed)


EDITS = st.dictionaries(
    st.sampled_from("pqrs"), st.none() | st.text(st.sampled_from("aAbBcd"), max_size=5), max_size=3
)
STEPS = st.lists(st.tuples(EDITS, st.sets(st.sampled_from("aAbBcd")), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_history_of_edits_leaves_the_references_of_a_plain_model(steps):
    with tempfile.TemporaryDirectory() as directory:
        manifest, model = Manifest(directory), Model()
        for edits, finished, dropping in steps:
            removed = [name for name, passages in edits.items() if passages is None]
            replaced = [document(name, text) for name, text in edits.items() if text is not None]
            assert manifest.remove_documents(removed) == model.change(dict.fromkeys(removed))
            assert manifest.replace_documents(replaced) == model.change(
                {name: text for name, text in edits.items() if text is not None}
            )
            manifest.mark_embedded(finished)
            manifest.mark_done({passage(letter).block_id for letter in finished})
            held = model.holders()
            needed = {passage(letter).block_id for letter in held}
            model.embedded |= finished & held.keys()
            model.done |= {passage(letter).block_id for letter in finished} & needed
            if dropping:
                gone: list[str] = []
                manifest.drop_passages(gone.extend)
                manifest.drop_blocks(gone.extend)
                assert not set(gone) & (held.keys() | needed)
                assert manifest.known_passages("aAbBcd") == held.keys()
                assert manifest.known_blocks(passage(letter).block_id for letter in "aAbBcd") == needed
            found = states(manifest)
            assert {name: state.num_documents for name, state in found.items()} == {
                name: len(holders) for name, holders in held.items()
            }
            assert {name for name, state in found.items() if state.is_embedded} == model.embedded
            assert {state.block_id for state in found.values() if state.is_done} == model.done
            assert {block.block_id for block in manifest.pending(99)} == needed - model.done
        manifest.close()
