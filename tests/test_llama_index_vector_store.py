"""LlamaIndex ingests, updates, deletes and retrieves through the store, and KV states follow."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index_pipelines import TINY_MODEL, TINY_TOKENIZER, WordHashes, own_settings
from rag_blockcache.integrations.llama_index import BlockCacheLLM, BlockCacheVectorStore

from rag_blockcache import BlockCache, Passage
from rag_blockcache.errors import IndexMismatchError, InvalidInputError
from rag_blockcache.passage_registry import PassageRegistry
from rag_blockcache.prefilled_index import PrefilledIndex

pytestmark = pytest.mark.usefixtures("own_settings")
__all__ = ["own_settings"]  # a fixture

ADA = "Ada Lovelace wrote the longest note on the analytical engine in 1843."
BOB = "Bob looks after the lighthouse on the north rock since his aunt left."
CAT = "The cat of the lighthouse keeper sleeps on the chart table all winter."
ENGINE = {"model": TINY_MODEL, "tokenizer": TINY_TOKENIZER}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
def store(directory):
    with closing(BlockCacheVectorStore(cache_dir=directory, **ENGINE)) as store:
        yield store
    store.engine.close()


def node(text, id_, embedding=(1.0, 0.0), source=None, **metadata):
    relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)} if source else {}
    return TextNode(
        text=text, id_=id_, embedding=list(embedding), metadata=metadata, relationships=relationships
    )


def shown(text, name="ada.txt"):
    return f"file_name: {name}\n\n{text}"


def stored(store, *texts):
    cache = store.engine.get()
    return [cache.block(text).block_id in cache.store.disk for text in texts]


def known(directory, *texts):
    with PassageRegistry(directory) as registry:
        return [text in registry for text in texts]


def documents(**texts):
    return [
        Document(text=text, id_=name, metadata={"file_name": f"{name}.txt"}) for name, text in texts.items()
    ]


def texts_in(store):
    return sorted(each.get_content(metadata_mode=MetadataMode.NONE) for each in store.get_nodes())


# Nodes


@pytest.mark.parametrize(
    "original",
    [
        node(ADA, "a", source="doc", file_name="ada.txt", year=1843, tags=["note", "engine"]),
        TextNode(
            text=f"  {ADA}\n",
            id_="b",
            metadata={"secret": "x", "shown": "y"},
            excluded_llm_metadata_keys=["secret"],
            text_template="[{metadata_str}] {content}",
            start_char_idx=3,
        ),
        IndexNode(text=BOB, index_id="other", id_="c"),
        ImageNode(text=CAT, image_url="http://example.org/cat.png", id_="d"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_node_comes_back_as_it_was_added(store, original):
    original.embedding = [1.0, 0.0]
    before = original.model_copy(deep=True)
    assert store.add([original]) == [original.node_id]
    assert original == before
    (found,) = store.get_nodes()
    original.embedding = None
    assert found == original
    assert found.get_content(MetadataMode.LLM) == original.get_content(MetadataMode.LLM)
    assert (found.hash, found.ref_doc_id) == (original.hash, original.ref_doc_id)


def test_a_document_comes_back_as_a_text_node_as_from_other_stores(store):
    original = Document(text=ADA, id_="e", metadata={"file_name": "ada.txt"}, embedding=[1.0, 0.0])
    store.add([original])
    (found,) = store.get_nodes()
    assert type(found) is TextNode
    assert (found.node_id, found.text, found.metadata) == ("e", ADA, original.metadata)
    assert found.get_content(MetadataMode.LLM) == original.get_content(MetadataMode.LLM)


def test_a_node_is_prefilled_as_a_model_is_shown_it_and_known_in_its_other_forms(store, directory):
    store.add([node(ADA, "a", file_name="ada.txt"), node(BOB, "b")])
    assert stored(store, shown(ADA), ADA, BOB) == [True, False, True]
    assert known(directory, shown(ADA), ADA, BOB) == [True, True, True]
    store.delete_nodes(["a"])
    assert stored(store, shown(ADA), ADA, BOB) == [False, False, True]
    assert known(directory, shown(ADA), ADA, BOB) == [False, False, True]


def test_a_sentence_window_is_known_as_it_will_be_shown(store, directory):
    text = f"{ADA} {BOB} {CAT}"
    parser = SentenceWindowNodeParser.from_defaults(
        window_size=1, sentence_splitter=lambda text: [f"{part}." for part in text.split(".") if part]
    )
    (first, *_) = nodes = parser.get_nodes_from_documents(documents(ada=text))
    for each in nodes:
        each.embedding = [1.0]
    store.add(nodes)
    window = first.metadata["window"]
    assert len(window) > len(first.text)
    assert known(directory, shown(first.text), window, shown(window)) == [True, True, True]
    assert stored(store, shown(first.text.strip()), window, shown(window)) == [True, False, False]
    store.clear()
    assert known(directory, shown(first.text), window, shown(window)) == [False, False, False]


def test_a_node_without_text_is_refused_by_name_and_nothing_is_added(store):
    with pytest.raises(InvalidInputError, match="node empty has no text"):
        store.add([node(ADA, "a"), node(" ", "empty")])
    assert store.get_nodes() == []


# Queries


def found(store, embedding=(1.0, 0.0), k=10, **options):
    query = VectorStoreQuery(query_embedding=list(embedding), similarity_top_k=k, **options)
    return store.query(query).ids


def test_a_query_gives_the_nearest_nodes_with_their_cosines(store):
    store.add([node(ADA, "a", (3.0, 0.0)), node(BOB, "b", (0.0, 1.0)), node(CAT, "c", (1.0, 1.0))])
    result = store.query(VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=2))
    assert result.ids == [each.node_id for each in result.nodes] == ["a", "c"]
    assert result.similarities == pytest.approx([1.0, 0.5**0.5])
    assert [each.text for each in result.nodes] == [ADA, CAT]


def test_a_query_may_be_limited_to_nodes_and_documents(store):
    store.add([node(ADA, "a", source="x"), node(BOB, "b", source="y"), node(CAT, "c")])
    assert found(store, node_ids=["c", "a", "gone"]) == ["a", "c"]
    assert found(store, doc_ids=["y", "z"]) == ["b"]
    only_ada = MetadataFilters(filters=[MetadataFilter(key="ref_doc_id", value="x")])
    assert found(store, doc_ids=["x", "y"], filters=only_ada, node_ids=["a", "b"]) == ["a"]
    assert found(store, doc_ids=[]) == found(store, node_ids=[]) == ["a", "b", "c"]  # as LlamaIndex means it
    assert found(store, node_ids=["gone", "a"]) == ["a"]


def test_mmr_prefers_what_is_not_like_the_best(store):
    store.add([node(ADA, "a", (1.0, 0.0)), node(f"{ADA}!", "b", (1.0, 0.01)), node(CAT, "c", (0.7, 0.7))])
    assert found(store, k=2) == ["a", "b"]
    assert found(store, k=2, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.3) == ["a", "c"]
    query = VectorStoreQuery(
        query_embedding=[1.0, 0.0], similarity_top_k=2, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.3
    )
    assert store.query(query, mmr_prefetch_k=2).ids == ["a", "b"]  # c is not among the candidates
    assert store.query(query, mmr_threshold=1.0).ids == ["a", "b"]


@pytest.mark.parametrize("mode", [VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.SVM])
def test_a_mode_that_it_does_not_have_is_refused(store, mode):
    with pytest.raises(InvalidInputError, match=mode.value):
        found(store, mode=mode)


def test_a_query_without_embedding_is_refused(store):
    with pytest.raises(InvalidInputError, match="no embedding"):
        store.query(VectorStoreQuery(query_str="Who?"))


PEOPLE = {
    "ada": {"year": 1843, "name": "Ada Lovelace", "tags": ["note", "engine"], "score": 0.5},
    "bob": {"year": 1990, "name": "Bob", "tags": ["rock"], "note": ""},
    "cat": {"name": "Cat", "tags": [], "note": None},
}


@pytest.mark.parametrize(
    ("operator", "key", "value", "names"),
    [
        (FilterOperator.EQ, "year", 1843, {"ada"}),
        (FilterOperator.EQ, "year", "1843", set()),
        (FilterOperator.NE, "year", 1843, {"bob", "cat"}),  # what is not there differs
        (FilterOperator.GT, "year", 1843, {"bob"}),
        (FilterOperator.GTE, "year", 1843, {"ada", "bob"}),
        (FilterOperator.LT, "score", 0.6, {"ada"}),
        (FilterOperator.LTE, "year", 1843, {"ada"}),
        (FilterOperator.GT, "name", 3, set()),  # a text and a number cannot be compared
        (FilterOperator.IN, "name", ["Bob", "Cat"], {"bob", "cat"}),
        (FilterOperator.NIN, "year", [1843, 7], {"bob", "cat"}),
        (FilterOperator.ANY, "tags", ["rock", "note"], {"ada", "bob"}),
        (FilterOperator.ALL, "tags", ["engine", "note"], {"ada"}),
        (FilterOperator.CONTAINS, "tags", "rock", {"bob"}),
        (FilterOperator.CONTAINS, "year", 1, set()),
        (FilterOperator.TEXT_MATCH, "name", "Love", {"ada"}),
        (FilterOperator.TEXT_MATCH, "name", "love", set()),
        (FilterOperator.TEXT_MATCH, "year", "18", set()),
        (FilterOperator.TEXT_MATCH_INSENSITIVE, "name", "LOVE", {"ada"}),
        (FilterOperator.IS_EMPTY, "note", None, {"ada", "bob", "cat"}),
        (FilterOperator.IS_EMPTY, "tags", None, {"cat"}),
    ],
)
def test_every_operator_of_filters_is_understood(store, operator, key, value, names):
    store.add([node(f"About {name}. {ADA}", name, **metadata) for name, metadata in PEOPLE.items()])
    filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])
    assert set(found(store, filters=filters)) == names
    assert {each.node_id for each in store.get_nodes(filters=filters)} == names


def test_every_operator_has_its_test():
    from rag_blockcache.integrations.llama_index.metadata_filters import as_condition

    for operator in FilterOperator:
        as_condition(MetadataFilters(filters=[MetadataFilter(key="x", value="y", operator=operator)]))


def test_filters_are_joined_and_nested(store):
    store.add([node(f"About {name}. {ADA}", name, **metadata) for name, metadata in PEOPLE.items()])

    def joined(condition, *filters):
        return MetadataFilters(filters=list(filters), condition=condition)

    is_ada, is_bob = (MetadataFilter(key="name", value=name) for name in ("Ada Lovelace", "Bob"))
    late = MetadataFilter(key="year", value=1900, operator=FilterOperator.GT)
    either = joined(FilterCondition.OR, is_ada, is_bob)
    assert set(found(store, filters=either)) == {"ada", "bob"}
    assert found(store, filters=joined(FilterCondition.AND, either, late)) == ["bob"]
    assert found(store, filters=joined(FilterCondition.NOT, is_ada, late)) == ["cat"]
    assert len(found(store, filters=joined(FilterCondition.AND))) == 3


# Deleting


def test_nodes_are_deleted_by_ids_and_filters(store):
    store.add([node(ADA, "a", lang="en"), node(BOB, "b", lang="de"), node(CAT, "c", lang="en")])
    english = MetadataFilters(filters=[MetadataFilter(key="lang", value="en")])
    store.delete_nodes(["a", "b"], filters=english)
    assert {each.node_id for each in store.get_nodes()} == {"b", "c"}
    store.delete_nodes(filters=english)
    assert store.get_nodes()[0].node_id == "b"
    with pytest.raises(InvalidInputError, match="clear"):
        store.delete_nodes()
    store.delete_nodes(["b", "gone"])
    assert store.get_nodes() == []
    assert stored(store, BOB, CAT) == [False, False]


def test_a_text_that_two_documents_have_stays_until_both_are_gone(store):
    store.add([node(ADA, "a", source="x"), node(ADA, "b", source="y"), node(CAT, "c", source="x")])
    assert store.index.totals.num_encoded_blocks == 2
    store.delete("x")
    assert [each.node_id for each in store.get_nodes()] == ["b"]
    assert stored(store, ADA, CAT) == [True, False]
    store.delete("y")
    store.delete("never there")
    assert stored(store, ADA) == [False]


# LlamaIndex's own ways of filling a store


def test_an_index_over_the_store_inserts_refreshes_updates_and_deletes(store, directory):
    index = VectorStoreIndex.from_documents(
        documents(ada=ADA, bob=BOB),
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=WordHashes(),
    )
    index.insert(documents(cat=CAT)[0])
    assert texts_in(store) == sorted([ADA, BOB, CAT])
    assert index.refresh_ref_docs(documents(ada=f"{ADA} She was right.", bob=BOB, cat=CAT)) == [
        True,
        False,
        False,
    ]
    assert texts_in(store) == sorted([f"{ADA} She was right.", BOB, CAT])
    index.delete_ref_doc("bob", delete_from_docstore=True)
    index.update_ref_doc(documents(cat=f"{CAT} It purrs.")[0])
    assert texts_in(store) == sorted([f"{ADA} She was right.", f"{CAT} It purrs."])
    (best,) = index.as_retriever(similarity_top_k=1).retrieve("cat chart table winter")
    assert (best.node.ref_doc_id, best.node.text) == ("cat", f"{CAT} It purrs.")
    changed = shown(f"{ADA} She was right.")
    assert stored(store, shown(ADA), shown(BOB, "bob.txt"), changed) == [False, False, True]
    assert known(directory, shown(ADA), shown(BOB, "bob.txt"), changed) == [False, False, True]
    totals = store.index.totals
    assert (totals.num_encoded_blocks, totals.num_dropped_blocks) == (5, 3)


def pipeline_over(store, strategy):
    return IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=200, chunk_overlap=0), WordHashes()],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
    )


@pytest.mark.parametrize(
    ("strategy", "left"),
    [(DocstoreStrategy.UPSERTS, {BOB, f"{ADA}!"}), (DocstoreStrategy.UPSERTS_AND_DELETE, {f"{ADA}!"})],
)
def test_a_pipeline_encodes_what_is_new_and_drops_what_went(store, strategy, left):
    pipeline = pipeline_over(store, strategy)
    pipeline.run(documents=documents(ada=ADA, bob=BOB))
    assert store.index.totals.num_encoded_blocks == 2
    pipeline.run(documents=documents(ada=ADA, bob=BOB))
    assert store.index.totals.num_encoded_blocks == 2
    pipeline.run(documents=documents(ada=f"{ADA}!"))
    assert set(texts_in(store)) == left
    totals = store.index.totals
    assert (totals.num_encoded_blocks, totals.num_dropped_blocks) == (3, 4 - len(left) - 1)
    assert stored(store, shown(ADA), shown(f"{ADA}!")) == [False, True]


def test_a_pipeline_that_passes_over_duplicates_encodes_each_text_once(store):
    pipeline = pipeline_over(store, DocstoreStrategy.DUPLICATES_ONLY)
    same = [Document(text=ADA, id_="one"), Document(text=ADA, id_="two"), Document(text=BOB, id_="three")]
    pipeline.run(documents=same)
    pipeline.run(documents=same)
    assert texts_in(store) == sorted([ADA, BOB])
    assert store.index.totals.num_encoded_blocks == 2


def test_documents_that_were_not_split_are_updated_under_their_own_names(store):
    pipeline = IngestionPipeline(
        transformations=[WordHashes()],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )
    pipeline.run(documents=documents(ada=ADA, bob=BOB))
    pipeline.run(documents=documents(ada=CAT))
    assert texts_in(store) == [CAT]
    assert stored(store, shown(ADA), shown(BOB, "bob.txt"), shown(CAT)) == [False, False, True]


def test_an_index_with_nodes_of_several_kinds_retrieves_all_of_them(store):
    nodes = [TextNode(text=ADA, id_="a"), IndexNode(text=BOB, index_id="other", id_="b")]
    index = VectorStoreIndex(
        nodes, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=WordHashes()
    )
    results = index.as_retriever(similarity_top_k=5).retrieve("lighthouse")
    assert {result.node.node_id for result in results} == {"a", "b"}


# With an LLM


def test_store_and_llm_share_one_engine_and_the_llm_reuses_what_was_added(store, directory):
    llm = BlockCacheLLM(cache_dir=directory, max_new_tokens=2, policy="block", **ENGINE)
    assert llm.engine.get() is store.engine.get()
    index = VectorStoreIndex.from_documents(
        documents(ada=ADA, bob=BOB, cat=CAT),
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=WordHashes(),
    )
    before = len(store.engine.get().store.disk)
    response = index.as_query_engine(llm=llm, similarity_top_k=3).query("Who wrote the note?")
    assert len(response.source_nodes) == 3
    asked = llm.complete(
        "\n\n".join(each.node.get_content(MetadataMode.LLM) for each in response.source_nodes)
    )
    assert (asked.additional_kwargs["num_hits"], asked.additional_kwargs["num_misses"]) == (3, 0)
    assert len(store.engine.get().store.disk) <= before + 1  # of the prompts, a preamble at most


# Opening, closing, waiting


def test_a_store_is_opened_again_from_its_directory(store, directory, tmp_path):
    store.add([node(ADA, "a", lang="en"), node(BOB, "b", (0.0, 1.0))])
    StorageContext.from_defaults(vector_store=store).persist(tmp_path / "context")
    assert list((directory / "index").glob("vectors-*.faiss"))
    store.close()
    reopened = BlockCacheVectorStore.from_persist_dir(directory, **ENGINE)
    with closing(reopened):
        assert found(reopened, k=1) == ["a"]
        reopened.add([node(CAT, "c")])
        assert len(reopened.get_nodes()) == 3
        index = VectorStoreIndex.from_vector_store(reopened, embed_model=MockEmbedding(embed_dim=2))
        assert len(index.as_retriever(similarity_top_k=5).retrieve("anything")) == 3


def test_without_a_model_it_indexes_and_prefills_when_there_is_one(directory):
    with closing(BlockCacheVectorStore(cache_dir=directory)) as store:
        assert store.engine is None
        store.add([node(ADA, "a", file_name="ada.txt")])
        assert found(store) == ["a"]
    with closing(BlockCacheVectorStore(cache_dir=directory, **ENGINE)) as store:
        assert store.index.prefill().num_encoded_blocks == 1
        assert stored(store, shown(ADA)) == [True]
        assert known(directory, ADA) == [True]
        store.engine.close()


def test_nodes_may_be_added_now_and_prefilled_later(directory):
    with closing(BlockCacheVectorStore(cache_dir=directory, prefills=False, **ENGINE)) as store:
        store.add([node(ADA, "a")])
        assert stored(store, ADA) == [False]
        store.add([node(BOB, "b")], prefill=True)
        assert stored(store, ADA, BOB) == [False, True]
        store.engine.close()


def test_passages_of_another_index_come_as_nodes_that_are_shown_as_they_were_prefilled(directory):
    options = {"tokenizer": TINY_TOKENIZER, "passage_format": "verbatim"}
    with (
        BlockCache(TINY_MODEL, directory, **options) as cache,
        PrefilledIndex(directory, cache=cache) as index,
    ):
        index.add(
            [Passage(ADA, passage_id="p", metadata={"source": "ada.txt", "page": 3})], embeddings=[[1.0, 0.0]]
        )
    with closing(BlockCacheVectorStore(cache_dir=directory, **ENGINE)) as store:
        (other,) = store.get_nodes(filters=MetadataFilters(filters=[MetadataFilter(key="page", value=3)]))
        assert other.get_content(metadata_mode=MetadataMode.LLM) == ADA
        assert (other.node_id, other.ref_doc_id) == ("p", "ada.txt")
        store.delete("ada.txt")
        assert store.get_nodes() == []
        store.engine.close()


def test_another_passage_format_is_refused(store, directory):
    store.add([node(ADA, "a")])
    with (
        closing(BlockCacheVectorStore(cache_dir=directory, passage_format="plain", **ENGINE)) as other,
        pytest.raises(IndexMismatchError, match="passage format"),
    ):
        other.add([node(BOB, "b")])


def test_an_unknown_field_is_refused(directory):
    with pytest.raises(ValueError, match="colour"):
        BlockCacheVectorStore(cache_dir=directory, colour="red")


async def test_the_event_loop_goes_on_while_nodes_are_added_queried_and_deleted(store, monkeypatch):
    loop_thread, threads = threading.get_ident(), set()
    for name in ("add", "search", "get", "delete", "delete_source", "clear"):
        work = getattr(PrefilledIndex, name)

        def noted(self, *args, _work=work, **options):
            threads.add(threading.get_ident())
            return _work(self, *args, **options)

        monkeypatch.setattr(PrefilledIndex, name, noted)
    assert await store.async_add([node(ADA, "a", source="x"), node(BOB, "b"), node(CAT, "c")]) == [
        "a",
        "b",
        "c",
    ]
    result = await store.aquery(VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=5))
    assert len(result.ids) == 3
    await store.adelete("x")
    await store.adelete_nodes(["b"])
    assert [each.node_id for each in await store.aget_nodes()] == ["c"]
    await store.aclear()
    assert await store.aget_nodes() == []
    assert loop_thread not in threads


async def test_pipelines_may_add_at_once(store):
    await asyncio.gather(*(store.async_add([node(f"{ADA} By {n}.", f"{n}")]) for n in range(8)))
    assert {each.node_id for each in store.get_nodes()} == {str(n) for n in range(8)}
    assert store.index.totals.num_encoded_blocks == 8
