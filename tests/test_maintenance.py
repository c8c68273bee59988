"""An index that is whole is found whole, damage is found and repaired, garbage goes and nothing else."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import torch

from rag_blockcache import BlockCache, Passage
from rag_blockcache.errors import IndexMismatchError, StoreError
from rag_blockcache.index_records import DocumentRecord, IndexSettings, PassageRecord
from rag_blockcache.jobs.index_lock import index_lock
from rag_blockcache.jobs.maintenance import collect_garbage, status, verify
from rag_blockcache.manifest import Manifest
from rag_blockcache.retriever import Retriever

TEXTS = ["Ada wrote the note.", "Charles built the engine.", "The engine was never finished."]


def embed(texts):
    return np.array([[len(text), text.count("e"), text.count("a") + 1.0] for text in texts])


class Index:
    """An index with one document a passage, made without the job."""

    def __init__(self, directory, model, tokenizer):
        self.directory = directory
        self.cache = BlockCache(model, directory, tokenizer=tokenizer)
        self.retriever = Retriever(directory / "index", embedder=embed)
        self.manifest = Manifest(directory)
        self.parts = {"cache": self.cache, "retriever": self.retriever, "manifest": self.manifest}
        self.manifest.adopt(IndexSettings("tiny", self.cache.fingerprint, "embed", "paper", "whole"))
        self.passages = [Passage(text, passage_id=Passage(text).content_id) for text in TEXTS]
        self.blocks = [self.cache.block(passage).block_id for passage in self.passages]
        self.add(self.passages)

    def add(self, passages):
        for passage in passages:
            block = self.cache.block(passage)
            record = PassageRecord(passage.passage_id, block.block_id, len(block.token_ids))
            self.manifest.replace_documents([DocumentRecord(passage.text, "1", (record,))])
        self.retriever.add(passages)
        self.cache.prefill(passages)
        self.manifest.mark_embedded(passage.passage_id for passage in passages)
        self.manifest.mark_done(self.cache.block(passage).block_id for passage in passages)

    def block_file(self, block_id):
        for path in (self.directory / "blocks").rglob("*.safetensors"):
            if block_id.encode() in path.read_bytes()[:4096]:
                return path
        raise AssertionError(block_id)

    def close(self):
        self.manifest.close()
        self.retriever.close()
        self.cache.close()


@pytest.fixture
def index(tiny_model, tiny_tokenizer, tmp_path):
    with closing(Index(tmp_path / "kv", tiny_model, tiny_tokenizer)) as index:
        yield index


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_index_that_is_whole_is_found_whole(index):
    report = verify(**index.parts)
    assert report.is_sound
    assert (report.num_passages, report.num_blocks) == (3, 3)


def test_a_damaged_block_is_found_and_encoded_again(index):
    before = index.cache.store[index.blocks[1]].keys.clone()
    damage(index.block_file(index.blocks[1]))
    report = verify(**index.parts)
    assert report.damaged_blocks == (index.blocks[1],)
    assert not report.is_sound
    assert verify(**index.parts, repair=True).num_repaired_blocks == 1
    assert verify(**index.parts).is_sound
    torch.testing.assert_close(index.cache.store.disk[index.blocks[1]].keys, before)


def test_a_damaged_block_that_no_passage_needs_is_deleted(index):
    stray = Passage("Nobody indexed this.")
    index.cache.prefill([stray])
    name = index.cache.block(stray).block_id
    damage(index.block_file(name))
    assert verify(**index.parts, repair=True).damaged_blocks == (name,)
    assert name not in index.cache.store
    assert verify(**index.parts).is_sound


def test_a_block_that_has_gone_is_found_and_encoded_again(index):
    del index.cache.store[index.blocks[0]]
    assert verify(**index.parts).missing_blocks == (index.blocks[0],)
    assert verify(**index.parts, repair=True).num_repaired_blocks == 1
    assert verify(**index.parts).is_sound


def test_repair_leaves_alone_what_was_never_meant_to_be_prefilled(index):
    passage = Passage("Not prefilled.", passage_id=Passage("Not prefilled.").content_id)
    block = index.cache.block(passage)
    record = PassageRecord(passage.passage_id, block.block_id, len(block.token_ids))
    index.manifest.replace_documents([DocumentRecord("later", "1", (record,))])
    index.retriever.add([passage])
    assert verify(**index.parts, repair=True).num_repaired_blocks == 0
    assert block.block_id not in index.cache.store


def test_a_passage_that_the_retriever_lost_is_indexed_again_by_the_next_job(index):
    lost = index.passages[0]
    index.retriever.delete([lost.passage_id])
    report = verify(**index.parts, repair=True)
    assert report.missing_passages == (lost.passage_id,)
    assert report.failures[0].source == lost.text
    assert "run index-and-prefill again" in report.failures[0].reason
    assert index.manifest.classify(lost.text, "1") == "changed"


def test_a_passage_whose_text_was_changed_is_found(index):
    changed = index.passages[0]
    index.retriever.add([Passage("Ada wrote nothing.", passage_id=changed.passage_id)])
    assert verify(**index.parts).changed_passages == (changed.passage_id,)
    verify(**index.parts, repair=True)
    assert changed.passage_id not in index.retriever
    assert index.manifest.unembedded([changed.passage_id])


def test_a_lost_vector_is_embedded_again(index):
    connection = sqlite3.connect(index.directory / "index" / "passages.sqlite")
    connection.execute("DELETE FROM vectors WHERE vector_id = 2")
    connection.commit()
    connection.close()
    report = verify(**index.parts, repair=True)
    assert len(report.index_problems) == 1
    assert report.num_repaired_passages == 1
    assert verify(**index.parts).is_sound


def test_a_lost_vector_that_nobody_here_can_make_is_told_and_its_text_is_kept(index):
    index.manifest.put_passages(
        (PassageRecord(passage.passage_id, index.cache.block(passage).block_id, 5), passage.content_id)
        for passage in index.passages
    )
    index.manifest.mark_embedded(passage.passage_id for passage in index.passages)
    with sqlite3.connect(index.directory / "index" / "passages.sqlite") as connection:
        connection.execute("DELETE FROM vectors WHERE vector_id = 2")
        connection.execute("UPDATE settings SET value = NULL WHERE name = 'embedder'")
    connection.close()
    with closing(Retriever(index.directory / "index")) as retriever:
        report = verify(cache=index.cache, retriever=retriever, manifest=index.manifest, repair=True)
        assert report.num_repaired_passages == 0
        assert "lost its vector" in report.failures[0].reason
        assert index.manifest.unfinished_passages() == [index.passages[1].passage_id]
        assert retriever.get([index.passages[1].passage_id]) == [index.passages[1]]


def test_a_passage_put_by_name_is_as_recorded_until_its_text_is_changed(index):
    named = Passage("The note was published in 1843.", passage_id="a name of its own")
    block = index.cache.block(named)
    record = PassageRecord(named.passage_id, block.block_id, len(block.token_ids))
    index.manifest.put_passages([(record, named.content_id)])
    index.retriever.add([named])
    index.manifest.mark_embedded([named.passage_id])
    assert verify(**index.parts).is_sound
    index.retriever.add([Passage("The note was lost.", passage_id=named.passage_id)])
    assert verify(**index.parts).changed_passages == (named.passage_id,)


def test_a_changed_index_file_is_made_again(index):
    index.retriever.save()
    (saved,) = (index.directory / "index").glob("*.faiss")
    damage(saved)
    assert verify(**index.parts, repair=True).index_problems
    assert verify(**index.parts).is_sound


def test_another_model_is_refused(index):
    other = BlockCache(index.cache.model.network, None, tokenizer=index.cache.tokenizer, salt="other")
    for job in (verify, collect_garbage):
        with pytest.raises(
            IndexMismatchError, match=r"was made with the model tiny .* open it with the former"
        ):
            job(cache=other, retriever=index.retriever, manifest=index.manifest)


@pytest.mark.parametrize("action", [verify, collect_garbage])
def test_blocks_of_another_kind_lose_nobody_a_passage(action, index, tiny_model, tiny_tokenizer):
    with (
        BlockCache(tiny_model, index.directory, tokenizer=tiny_tokenizer, blocks_see="themselves") as other,
        pytest.raises(IndexMismatchError, match="blocks_see='themselves'"),
    ):
        action(**{**index.parts, "cache": other})
    assert len(index.retriever) == len(index.passages)


def test_progress_is_told_for_blocks_and_passages(index):
    told = []
    verify(**index.parts, progress=told.append)
    assert [(each.stage, each.num_done, each.num_total) for each in told] == [
        ("blocks", 1, 3),
        ("blocks", 2, 3),
        ("blocks", 3, 3),
        ("passages", 3, 3),
    ]


def test_what_no_document_holds_is_garbage_and_the_rest_is_not(index):
    index.manifest.remove_documents([TEXTS[0]])
    planned = collect_garbage(**index.parts, dry_run=True)
    assert (planned.num_passages, planned.num_blocks, planned.num_bytes) == (1, 1, 0)
    assert index.blocks[0] in index.cache.store
    report = collect_garbage(**index.parts)
    assert (report.num_passages, report.num_blocks) == (1, 1)
    assert report.num_bytes > 1000
    assert sorted(index.cache.store) == sorted(index.blocks[1:])
    assert sorted(index.retriever) == sorted(passage.passage_id for passage in index.passages[1:])
    assert verify(**index.parts).is_sound


def test_vectors_without_passage_on_record_are_garbage(index):
    index.retriever.add(["A passage that no job knows of."])
    assert collect_garbage(**index.parts).num_passages == 1
    assert len(index.retriever) == 3


def test_blocks_of_questions_over_other_passages_go_only_when_asked_for(index):
    stray = Passage("Nobody indexed this.")
    index.cache.prefill([stray])
    assert collect_garbage(**index.parts).num_unknown_blocks == 1
    assert index.cache.block(stray).block_id in index.cache.store
    assert collect_garbage(**index.parts, unknown_blocks=True).num_unknown_blocks == 1
    assert sorted(index.cache.store) == sorted(index.blocks)


def test_files_that_belong_to_nothing_go_and_entries_without_file_are_encoded_again(index):
    orphan = index.block_file(index.blocks[0]).parent / f"{'0' * 30}.safetensors"
    orphan.write_bytes(b"half a block")
    os.unlink(index.block_file(index.blocks[1]))
    assert collect_garbage(**index.parts).num_lost_blocks == 1
    assert not orphan.exists()
    assert [block.block_id for block in index.manifest.pending(9)] == [index.blocks[1]]


def test_garbage_is_not_collected_while_a_job_is_at_work(index):
    with index_lock(index.directory, exclusive=False), pytest.raises(StoreError, match="another job"):
        collect_garbage(**index.parts)


def test_an_index_that_nothing_was_indexed_into_has_no_garbage(index, tmp_path):
    with (
        closing(Manifest(tmp_path / "other")) as manifest,
        pytest.raises(StoreError, match="nothing was indexed"),
    ):
        collect_garbage(cache=index.cache, retriever=index.retriever, manifest=manifest)


def test_status_tells_counts_sizes_and_settings(index):
    found = status(index.directory)
    assert found.settings is not None
    assert found.settings.model == "tiny"
    assert (found.counts.num_documents, found.counts.num_pending_blocks) == (3, 0)
    assert found.num_bytes > found.num_block_bytes > 3 * index.cache.model.kv_bytes_per_token
    assert found.num_index_bytes > 0


def test_status_of_a_directory_without_index_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="there is no index"):
        status(tmp_path)
    assert not list(tmp_path.iterdir())
