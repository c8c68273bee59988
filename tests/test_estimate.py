"""An estimate counts what the job will count, and its sums come out."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict

import pytest
from job_corpus import run, splitter

from rag_blockcache import BlockCache
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.jobs import estimate as estimate_module
from rag_blockcache.jobs.estimate import estimate

SHARED = "This licence is shared by all of them."


@pytest.fixture(scope="module")
def cache(tiny_model, tiny_tokenizer):
    with closing(BlockCache(tiny_model, None, tokenizer=tiny_tokenizer)) as cache:
        yield cache


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("ada", "bob", "cat"):
        texts = [f"About {name} there is a lot to say, more than fits here.", SHARED]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_it_counts_what_the_job_then_does(cache, corpus, tmp_path, tiny_model, tiny_tokenizer):
    expected = estimate([corpus], cache=cache, splitter=splitter(), tokens_per_second=100)
    engine = BlockCache(tiny_model, tmp_path / "out", tokenizer=tiny_tokenizer)
    report = run(tmp_path / "out", [corpus], cache=engine)
    assert expected.num_documents == report.num_new_documents == 3
    assert expected.num_passages == report.num_encoded_blocks == 4
    assert expected.num_tokens == report.num_tokens
    assert expected.num_bytes == report.num_bytes


def test_a_given_rate_decides_all_times(cache, corpus):
    found = estimate(
        [corpus], cache=cache, splitter=splitter(), tokens_per_second=10, passages_per_question=2
    )
    assert found.prefill_hours == pytest.approx(found.num_tokens / 10 / 3600)
    assert found.full_ttft_seconds - found.reuse_ttft_seconds == pytest.approx(found.num_tokens / 4 * 2 / 10)
    assert found.break_even_uses == 1
    assert found.break_even_bytes_per_second == pytest.approx(10 * cache.model.kv_bytes_per_token)
    assert found.break_even_reads_per_second == pytest.approx(10 / (found.num_tokens / 4))
    assert not found.speed.is_measured


def test_speed_is_measured_on_passages_of_the_corpus_and_nothing_is_left_behind(cache, corpus):
    found = estimate([corpus], cache=cache, splitter=splitter())
    assert found.speed.is_measured
    assert found.speed.tokens_per_second > 0
    assert found.prefill_hours > 0
    assert found.full_ttft_seconds >= found.speed.question_seconds > 0


def test_the_sums_of_a_measured_speed_come_out(cache, corpus, monkeypatch):
    speed = estimate_module.Speed(200.0, 0.01, 0.002, 0.5, is_measured=True)
    monkeypatch.setattr(estimate_module, "_measured", lambda *_: speed)
    found = estimate([corpus], cache=cache, splitter=splitter(), passages_per_question=1000)
    assert found.full_ttft_seconds == pytest.approx(0.5 + 0.01 * found.num_tokens)  # there are no more than 4
    assert found.reuse_ttft_seconds == pytest.approx(0.5 + 0.002 * found.num_tokens)
    assert found.break_even_uses == 1  # 5 ms to encode a token, 8 ms saved with each use
    assert found.break_even_bytes_per_second == pytest.approx(cache.model.kv_bytes_per_token / 0.008)


def test_reuse_that_saves_nothing_never_breaks_even(cache, corpus, monkeypatch):
    speed = estimate_module.Speed(200.0, 0.01, 0.02, 0.5, is_measured=True)
    monkeypatch.setattr(estimate_module, "_measured", lambda *_: speed)
    found = estimate([corpus], cache=cache, splitter=splitter())
    assert (found.break_even_uses, found.break_even_bytes_per_second) == (None, None)


def test_it_says_whether_the_blocks_fit_on_the_disk(cache, corpus, tmp_path, monkeypatch):
    directory = tmp_path / "not" / "there" / "yet"
    options = {"cache": cache, "splitter": splitter(), "tokens_per_second": 10, "directory": directory}
    found = estimate([corpus], **options)
    assert found.fits
    assert found.free_bytes > 0
    monkeypatch.setattr(estimate_module, "_free_bytes", lambda path: found.num_bytes - 1)
    assert estimate([corpus], **options).fits is False
    assert not directory.exists()


def test_a_passage_longer_than_the_window_is_reported_and_not_counted(cache, corpus):
    (corpus / "long.jsonl").write_text(json.dumps({"text": "long " * 1000}) + "\n")
    found = estimate([corpus], cache=cache, splitter=splitter(), tokens_per_second=10)
    assert found.num_passages == 4
    assert "the model's window of 2,048" in found.failures[0].reason


def test_documents_that_cannot_be_used_are_counted_and_reported_as_the_job_does(
    cache, corpus, tmp_path, tiny_model, tiny_tokenizer
):
    (corpus / "binary.txt").write_bytes(b"\xff\xfe\xff half a \x00 text \xff")
    (corpus / "damaged.pdf").write_bytes(b"%PDF-1.4 and no more")
    (corpus / "gone.txt").symlink_to(corpus / "nowhere.txt")
    (corpus / "half.jsonl").write_text('{"text": "half a character: \\ud800"}\n{"text": \n')
    found = estimate([corpus], cache=cache, splitter=splitter(), tokens_per_second=10)
    assert (found.num_documents, found.num_failed_documents, found.num_passages) == (4, 4, 4)
    engine = BlockCache(tiny_model, tmp_path / "out", tokenizer=tiny_tokenizer)
    report = run(tmp_path / "out", [corpus], cache=engine)
    assert set(found.failures) == set(report.failures)
    assert found.num_failed_documents == report.num_failed_documents
    assert found.num_passages == report.num_encoded_blocks


def test_a_corpus_of_unreadable_documents_only_is_an_error_that_says_why(cache, tmp_path):
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.4 and no more")
    with pytest.raises(InvalidInputError, match=r"damaged\.pdf: it is not a sound PDF"):
        estimate([tmp_path], cache=cache, splitter=splitter())


def test_progress_is_told_after_each_document(cache, corpus):
    told = []
    estimate([corpus], cache=cache, splitter=splitter(), tokens_per_second=10, progress=told.append)
    assert [progress.num_done for progress in told] == [1, 2, 3]


def test_an_estimate_can_be_written_as_json(cache, corpus):
    assert json.dumps(asdict(estimate([corpus], cache=cache, splitter=splitter(), tokens_per_second=10)))


def test_a_corpus_without_passages_is_an_error(cache, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError):
        estimate([tmp_path / "empty"], cache=cache, splitter=splitter())


@pytest.mark.parametrize(
    "options", [{"tokens_per_second": 0.0}, {"tokens_per_second": -1.0}, {"passages_per_question": 0}]
)
def test_numbers_that_are_not_positive_are_refused(cache, corpus, options):
    with pytest.raises(InvalidInputError, match="must be positive"):
        estimate([corpus], cache=cache, splitter=splitter(), **options)
