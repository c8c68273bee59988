"""LangChain adds, updates, deletes and searches through the store, and KV states follow."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed")
pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

import architectures
from conftest import byte_tokenizer
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests
from pydantic import ValidationError
from rag_blockcache.integrations.langchain import BlockCacheVectorStore, ChatBlockCache
from rag_blockcache.integrations.langchain.retrievers import BlockCacheRetriever

from rag_blockcache import BlockCache, Passage
from rag_blockcache.errors import IndexMismatchError, InvalidInputError
from rag_blockcache.passage_registry import PassageRegistry
from rag_blockcache.prefilled_index import PrefilledIndex

ADA = "Ada Lovelace wrote the longest note on the analytical engine in 1843."
BOB = "Bob looks after the lighthouse on the north rock since his aunt left."
CAT = "The cat of the lighthouse keeper sleeps on the chart table all winter."
TINY_MODEL = architectures.build("Llama", {"max_position_embeddings": 4096})
TINY_TOKENIZER = byte_tokenizer()
ENGINE = {"model": TINY_MODEL, "tokenizer": TINY_TOKENIZER}


class Corners(Embeddings):
    """Three texts at right angles, everything else between them; counts what it is asked for."""

    def __init__(self):
        self.calls = []

    def embed_documents(self, texts):
        self.calls.append("documents")
        return [self._embed(text) for text in texts]

    def embed_query(self, text):
        self.calls.append("query")
        return self._embed(text)

    async def aembed_documents(self, texts):
        self.calls.append("documents, async")
        return [self._embed(text) for text in texts]

    async def aembed_query(self, text):
        self.calls.append("query, async")
        return self._embed(text)

    def _embed(self, text):
        near = [float(text.startswith(each[:3])) for each in (ADA, BOB, CAT)]
        return near if any(near) else [1.0, -1.0, 0.5]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
def store(directory):
    with closing(BlockCacheVectorStore(Corners(), directory, **ENGINE)) as store:
        yield store
    store.engine.close()


def stored(store, *texts):
    cache = store.engine.get()
    return [cache.block(text).block_id in cache.store.disk for text in texts]


def known(directory, *texts):
    with PassageRegistry(directory) as registry:
        return [text in registry for text in texts]


def texts_of(documents):
    return [document.page_content for document in documents]


# LangChain's own tests


class TestStandardVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path):
        store = BlockCacheVectorStore(self.get_embeddings(), tmp_path / "kv", **ENGINE)
        with closing(store):
            yield store
        store.engine.close()


class TestStandardVectorStoreWithoutModel(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path):
        with closing(BlockCacheVectorStore(self.get_embeddings(), tmp_path / "kv")) as store:
            yield store


class TestStandardRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path):
        texts = [ADA, BOB, CAT, f"{ADA}!"]
        store = BlockCacheVectorStore.from_texts(
            texts, DeterministicFakeEmbedding(size=6), cache_dir=tmp_path / "kv", **ENGINE
        )
        with closing(store):
            self.store = store
            yield
        store.engine.close()

    @property
    def retriever_constructor(self):
        return BlockCacheRetriever

    @property
    def retriever_constructor_params(self):
        return {"vectorstore": self.store}

    @property
    def retriever_query_example(self):
        return "Who wrote the note?"


# What is put in, and found


def test_documents_come_back_as_they_were_added_and_are_prefilled(store, directory):
    document = Document(f"  {ADA}\n", metadata={"lang": "en", "tags": ["a", 1, None]})
    names = store.add_documents([document, Document(BOB, id="b")])
    assert names[1] == "b"
    assert store.get_by_ids([names[0], "gone"]) == [document.model_copy(update={"id": names[0]})]
    assert document.id is None
    assert stored(store, ADA, BOB, CAT) == [True, True, False]
    assert known(directory, ADA, BOB, CAT) == [True, True, False]


def test_adding_the_same_without_ids_again_changes_nothing(store):
    names = store.add_texts([ADA, ADA], [{"page": 1}, {"page": 2}])
    assert store.add_texts([ADA, ADA], [{"page": 1}, {"page": 2}]) == names
    assert len(set(names)) == len(store.index) == 2
    assert store.index.totals.num_encoded_blocks == 1


def test_ids_of_the_call_come_before_those_of_the_documents(store):
    documents = [Document(ADA, id="a"), Document(BOB, id="b")]
    names = store.add_documents(documents, ids=["x", None])
    assert names[0] == "x"
    assert names[1] not in ("b", "x", "")
    with pytest.raises(InvalidInputError, match="1 ids came for 2 documents"):
        store.add_documents(documents, ids=["x"])


def test_a_changed_document_takes_the_place_of_the_former(store, directory):
    store.add_texts([ADA], ids=["a"])
    store.add_texts([BOB], ids=["a"])
    assert texts_of(store.get_by_ids(["a"])) == [BOB]
    assert stored(store, ADA, BOB) == [False, True]
    assert known(directory, ADA, BOB) == [False, True]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document(" "), "has no text"),
        (Document(ADA, metadata={"when": object()}), "cannot be stored as JSON"),
    ],
)
def test_a_document_that_cannot_be_kept_is_refused(store, document, message):
    with pytest.raises(InvalidInputError, match=message):
        store.add_documents([Document(BOB), document])
    assert len(store.index) == 0


def test_scores_are_cosines_and_relevance_is_never_below_nought(store):
    store.add_texts([ADA, BOB], ids=["a", "b"])
    (best, score), (second, other) = store.similarity_search_with_score("who?")
    assert (best.id, second.id) == ("a", "b")
    assert (score, other) == pytest.approx((1 / 1.5, -1 / 1.5))
    found = store.similarity_search_with_relevance_scores("who?")
    assert [relevance for _, relevance in found] == pytest.approx([1 / 1.5, 0.0])
    found = store.similarity_search_with_relevance_scores("who?", score_threshold=0.5)
    assert [document.id for document, _ in found] == ["a"]


def test_filters_take_values_lists_and_callables(store):
    store.add_texts([ADA, BOB, CAT], [{"n": 1}, {"n": 2}, {"n": 3}], ids=["a", "b", "c"])

    def found(where, **options):
        return {document.id for document in store.similarity_search("who?", filter=where, **options)}

    assert found({"n": 2}) == {"b"}
    assert found({"n": [1, 3]}) == {"a", "c"}
    assert found({"n": lambda n: n > 1}) == {"b", "c"}
    assert found(lambda metadata: metadata["n"] != 2, k=1) == {"a"}
    assert [each.id for each in store.similarity_search_by_vector([0, 0, 1], filter={"n": [1, 2]}, k=1)] == [
        "a"
    ]
    with pytest.raises(InvalidInputError, match=r"does not know \['fetch_k'\]"):
        store.similarity_search("who?", fetch_k=7)
    with pytest.raises(InvalidInputError, match=r"does not know \['colour'\]"):
        store.add_texts([ADA], colour="red")


def test_mmr_prefers_what_is_not_like_the_best(store):
    store.add_texts([ADA, f"{ADA}!", CAT], [{}, {}, {"skip": True}], ids=["a", "b", "c"])
    assert [each.id for each in store.similarity_search("who?", k=2)] == ["a", "b"]
    assert [each.id for each in store.max_marginal_relevance_search("who?", k=2, lambda_mult=0.3)] == [
        "a",
        "c",
    ]
    assert [each.id for each in store.max_marginal_relevance_search("who?", k=2, fetch_k=2)] == ["a", "b"]
    chosen = store.max_marginal_relevance_search("who?", k=2, lambda_mult=0.3, filter=lambda m: not m)
    assert [each.id for each in chosen] == ["a", "b"]
    by_vector = store.max_marginal_relevance_search_by_vector([1.0, -1.0, 0.5], k=2, lambda_mult=0.3)
    assert [each.id for each in by_vector] == ["a", "c"]
    assert len(store.max_marginal_relevance_search("who?", k=3, fetch_k=1)) == 3


def test_an_empty_store_finds_nothing_in_any_way(store):
    assert store.similarity_search("who?") == store.max_marginal_relevance_search("who?") == []
    assert store.as_retriever(search_type="mmr").invoke("who?") == []


def test_deleting_all_needs_no_ids(store, directory):
    store.add_texts([ADA, BOB])
    assert store.delete() is True
    assert len(store.index) == 0
    assert stored(store, ADA, BOB) == known(directory, ADA, BOB) == [False, False]


# The retriever


def test_the_number_of_documents_comes_from_the_call_then_the_options_then_the_retriever(store):
    store.add_texts([ADA, BOB, CAT, f"{ADA}!", f"{BOB}!"])
    assert len(store.as_retriever().invoke("who?")) == 4
    assert len(store.as_retriever(k=2).invoke("who?")) == 2
    assert len(store.as_retriever(k=2, search_kwargs={"k": 3}).invoke("who?")) == 3
    assert len(store.as_retriever(k=2, search_kwargs={"k": 3}).invoke("who?", k=1)) == 1
    assert len(store.as_retriever(search_type="mmr", k=2).invoke("who?")) == 2
    near = store.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.9}, k=5
    )
    assert texts_of(near.invoke(ADA)) == [ADA, f"{ADA}!"]
    assert store.as_retriever().tags == ["BlockCacheVectorStore", "Corners"]


# index() with a record manager


def test_index_encodes_what_is_new_and_drops_what_went(store, directory):
    manager = InMemoryRecordManager("test")
    manager.create_schema()

    def run(cleanup, **texts):
        documents = [Document(text, metadata={"source": name}) for name, text in texts.items()]
        before = store.index.totals
        result = index(
            documents, manager, store, cleanup=cleanup, source_id_key="source", key_encoder="blake2b"
        )
        now = store.index.totals
        return (
            result["num_added"],
            result["num_skipped"],
            result["num_deleted"],
            now.num_encoded_blocks - before.num_encoded_blocks,
            now.num_dropped_blocks - before.num_dropped_blocks,
        )

    assert run("incremental", ada=ADA, bob=BOB) == (2, 0, 0, 2, 0)
    assert run("incremental", ada=ADA, bob=BOB) == (0, 2, 0, 0, 0)
    assert run("incremental", ada=f"{ADA}!", bob=BOB) == (1, 1, 1, 1, 1)
    assert stored(store, ADA, f"{ADA}!", BOB) == [False, True, True]
    assert run("incremental", cat=BOB) == (1, 0, 0, 0, 0)  # a text that is stored already
    assert run("scoped_full", cat=CAT) == (1, 0, 1, 1, 0)  # bob has that text still
    assert run("full", cat=CAT) == (0, 1, 2, 0, 2)
    assert texts_of(store.similarity_search("who?")) == [CAT]
    assert stored(store, ADA, f"{ADA}!", BOB, CAT) == [False, False, False, True]
    assert known(directory, ADA, f"{ADA}!", BOB, CAT) == [False, False, False, True]


async def test_aindex_does_the_same(store):
    manager = InMemoryRecordManager("test")
    await manager.acreate_schema()
    options = {"cleanup": "full", "source_id_key": "source", "key_encoder": "blake2b"}
    documents = [Document(text, metadata={"source": text[:3]}) for text in (ADA, BOB)]
    assert (await aindex(documents, manager, store, **options))["num_added"] == 2
    assert (await aindex(documents[:1], manager, store, **options))["num_deleted"] == 1
    totals = store.index.totals
    assert (totals.num_encoded_blocks, totals.num_dropped_blocks) == (2, 1)


# With a chat model


def test_store_and_chat_model_share_one_engine_and_the_model_reuses_what_was_added(store, directory):
    chat = ChatBlockCache(cache_dir=directory, max_tokens=2, policy="block", **ENGINE)
    assert chat.engine.get() is store.engine.get()
    store.add_texts([ADA, BOB, CAT])
    context = "\n\n".join(texts_of(store.as_retriever(k=3).invoke("who?")))
    answer = chat.invoke(f"Answer from:\n\n{context}\n\nWho wrote the note?")
    assert answer.response_metadata["num_hits"] == 3
    assert answer.response_metadata["num_misses"] == 0


# Opening, waiting


def test_an_option_that_does_not_exist_is_refused(directory):
    with pytest.raises(ValidationError, match="sallt"):
        BlockCacheVectorStore(Corners(), directory, sallt="a", **ENGINE)
    assert not directory.exists()


def test_a_store_is_opened_again_from_its_directory(store, directory):
    store.add_texts([ADA, BOB], ids=["a", "b"])
    store.close()
    assert list((directory / "index").glob("vectors-*.faiss"))
    with closing(BlockCacheVectorStore(Corners(), directory, **ENGINE)) as again:
        assert texts_of(again.similarity_search(BOB, k=1)) == [BOB]
        again.add_texts([CAT], ids=["c"])
        assert len(again.index) == 3


def test_documents_may_be_added_now_and_prefilled_later(directory):
    with closing(BlockCacheVectorStore(Corners(), directory)) as store:
        assert store.engine is None
        store.add_texts([ADA])
        assert texts_of(store.similarity_search(ADA)) == [ADA]
    with closing(BlockCacheVectorStore(Corners(), directory, prefills=False, **ENGINE)) as store:
        store.add_texts([BOB])
        assert stored(store, ADA, BOB) == [False, False]
        store.add_texts([CAT], prefill=True)
        assert stored(store, ADA, BOB, CAT) == [False, False, True]
        assert store.index.prefill().num_encoded_blocks == 2
        assert stored(store, ADA, BOB) == [True, True]
        store.engine.close()


def test_passages_of_another_index_come_as_documents(directory):
    options = {"tokenizer": TINY_TOKENIZER, "passage_format": "verbatim"}
    passage = Passage(ADA, passage_id="p", metadata={"source": "ada.txt"})
    with (
        BlockCache(TINY_MODEL, directory, **options) as cache,
        PrefilledIndex(directory, cache=cache) as other,
    ):
        other.add([passage], embeddings=[[1.0, 0.0, 0.0]])
    with closing(BlockCacheVectorStore(Corners(), directory, **ENGINE)) as store:
        assert store.similarity_search(ADA) == [Document(ADA, id="p", metadata={"source": "ada.txt"})]
        store.engine.close()


def test_another_passage_format_or_dimension_is_refused(store, directory):
    store.add_texts([ADA])
    with (
        closing(BlockCacheVectorStore(Corners(), directory, passage_format="plain", **ENGINE)) as other,
        pytest.raises(IndexMismatchError, match="passage format"),
    ):
        other.add_texts([BOB])
    with (
        closing(BlockCacheVectorStore(DeterministicFakeEmbedding(size=9), directory, **ENGINE)) as other,
        pytest.raises(IndexMismatchError, match="dimensions"),
    ):
        other.add_texts([BOB])


async def test_the_event_loop_goes_on_while_documents_are_added_searched_and_deleted(store, monkeypatch):
    loop_thread, threads = threading.get_ident(), set()
    for name in ("add", "search", "get", "delete", "clear"):
        work = getattr(PrefilledIndex, name)

        def noted(self, *args, _work=work, **options):
            threads.add(threading.get_ident())
            return _work(self, *args, **options)

        monkeypatch.setattr(PrefilledIndex, name, noted)
    assert await store.aadd_texts([ADA, BOB, CAT], ids=["a", "b", "c"]) == ["a", "b", "c"]
    assert [each.id for each in await store.asimilarity_search(BOB, k=1)] == ["b"]
    assert [each.id for each in await store.amax_marginal_relevance_search(BOB, k=1)] == ["b"]
    assert [each.id for each, _ in await store.asimilarity_search_with_score(BOB, k=1)] == ["b"]
    assert [each.id for each in await store.as_retriever(k=1).ainvoke(CAT)] == ["c"]
    await store.adelete(["a"])
    assert [each.id for each in await store.aget_by_ids(["a", "b"])] == ["b"]
    await store.adelete()
    assert loop_thread not in threads
    assert {call.partition(", ")[2] for call in store.embeddings.calls} == {"async"}


async def test_documents_may_be_added_at_once(store):
    await asyncio.gather(*(store.aadd_texts([f"{ADA} By {n}."], ids=[f"{n}"]) for n in range(8)))
    assert sorted(store.index) == [str(n) for n in range(8)]
    assert store.index.totals.num_encoded_blocks == 8
