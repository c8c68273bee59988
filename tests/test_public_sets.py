"""Public benchmarks are read through ``datasets``, here from folders of the same form as on the hub."""

import builtins

import pytest
import qa_data

from rag_blockcache.errors import InvalidInputError, MissingDependencyError
from rag_blockcache.evaluation.public_sets import PUBLIC_SETS, PublicSet, load_benchmark, load_public
from rag_blockcache.passages import Passage


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="the extra 'benchmarks' is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return library


HOTPOT = {
    "id": "5a",
    "question": "How deep?",
    "answer": "thirty yards",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": {"title": ["Well", "Mill"], "sent_id": [0, 1]},
    "context": {
        "title": ["Mill", "Inn", "Well"],
        "sentences": [["Built in 1787.", "By Ruth Hale."], ["It burned down."], ["Thirty yards deep."]],
    },
}
TEVATRON = {
    "query_id": "9",
    "query": "who built the mill",
    "answers": ["Ruth Hale"],
    "positive_passages": [{"docid": "1", "title": "Mill", "text": "Built by Ruth Hale."}],
    "negative_passages": [{"docid": "2", "title": "Well", "text": "It is deep."}],
}


@pytest.mark.parametrize("name", ["hotpotqa", "2wiki"])
def test_parquet_of_a_split_is_read_as_the_hub_serves_it(datasets, tmp_path, name):
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list([HOTPOT, {**HOTPOT, "id": "5b"}])
    table.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    source = PublicSet(str(folder), PUBLIC_SETS[name].split)
    [first, second] = load_public(source, name)
    assert (first.example_id, second.example_id, first.dataset) == ("5a", "5b", name)
    assert first.passages[0] == Passage("Built in 1787. By Ruth Hale.", "Mill")
    assert first.is_gold == (True, False, True)
    assert len(load_public(source, name, 1)) == 1
    assert load_benchmark(f"hf:{folder}:validation", 1)[0].passages == first.passages


@pytest.mark.parametrize("name", ["nq", "triviaqa"])
def test_json_lines_of_a_repository_are_read_without_its_script(datasets, tmp_path, name):
    folder = tmp_path / "repository"
    folder.mkdir()
    source = PUBLIC_SETS[name]
    qa_data.write(folder / source.data_file, [TEVATRON] * 3)
    found = load_public(PublicSet(str(folder), source.split, data_file=source.data_file), name, 2)
    assert [example.question for example in found] == ["who built the mill"] * 2
    assert sorted(passage.title for passage in found[0].passages) == ["Mill", "Well"]
    assert found[0].gold_position in (1, 2)


def test_a_record_of_an_unknown_form_is_named(datasets, tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    qa_data.write(folder / "validation.jsonl", [{"question": "Who?", "answers": ["x"]}])
    with pytest.raises(InvalidInputError, match=r"record 1 of .* not found among"):
        load_benchmark(f"hf:{folder}:validation")


def test_what_is_not_there_is_an_error_that_says_what_to_do(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match=r"cannot be read.*give the file"):
        load_benchmark(f"hf:{tmp_path / 'empty'}:validation")


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r"rag_blockcache\[benchmarks\]"):
        load_benchmark("hf:nq", 1)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(InvalidInputError, match="hf:nq, hf:triviaqa, hf:hotpotqa, hf:2wiki"):
        load_benchmark("hf:squad")


def test_a_name_without_a_prefix_is_a_file(tmp_path):
    path = qa_data.write(tmp_path / "village.jsonl", qa_data.rows())
    assert len(load_benchmark(path, 3)) == 3
