"""Documents become texts, texts become passages, and what cannot be read is reported."""

import codecs
import json
import logging
import os
import random
import sys

import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.jobs.documents import (
    Document,
    PassageSplitter,
    UnreadableDocument,
    read_documents,
    split_document,
)

TOKENIZER = byte_tokenizer()


def read_one(path):
    (document,) = read_documents([path])
    return document


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reason_of(path):
    document = read_one(path)
    assert isinstance(document, UnreadableDocument)
    assert document.document_id == str(path)
    return document.reason


def num_tokens(text):
    return len(TOKENIZER.encode(text, add_special_tokens=False))


def pdf(*pages, title=None):
    """Make a small PDF by hand: a page of text for each argument."""
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for index, page in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET" if page else ""
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
            f" /Contents {5 + 2 * index} 0 R >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects.append(f"<< /Title ({title}) >>" if title else "<< >>")
    content, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return (
        f"{content}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer << /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>\n"
        f"startxref\n{len(content)}\n%%EOF"
    ).encode()


# Files and folders


def test_folders_are_read_recursively_sorted_and_without_hidden_files(tmp_path, caplog):
    for name in (
        "b.txt",
        "a.MD",
        "sub/c.txt",
        "sub/.hidden.txt",
        ".git/d.txt",
        "image.png",
        "z",
        "sub/x.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, name)
    with caplog.at_level(logging.INFO, logger="rag_blockcache"):
        documents = list(read_documents([tmp_path]))
    assert [document.document_id for document in documents] == [
        str(tmp_path / name) for name in ("a.MD", "b.txt", "sub/c.txt")
    ]
    assert "passed over 3 files of other kinds: 2 .png, 1 without suffix" in caplog.text


def test_a_file_named_twice_is_read_once(tmp_path):
    path = written(tmp_path / "a.txt", "text")
    assert len(list(read_documents([path, tmp_path, str(path)]))) == 1


def test_a_path_that_does_not_exist_is_an_error_at_once(tmp_path):
    with pytest.raises(InvalidInputError, match=r"absent\.txt does not exist"):
        read_documents([tmp_path, tmp_path / "absent.txt"])


def test_another_kind_named_explicitly_is_an_error_at_once(tmp_path):
    with pytest.raises(InvalidInputError, match=r"image\.png is of a kind .*\.jsonl"):
        read_documents([written(tmp_path / "image.png", b"x")])


def test_a_single_path_in_place_of_a_sequence_is_an_error(tmp_path):
    with pytest.raises(InvalidInputError, match="wrap a single path"):
        read_documents(str(tmp_path))


def test_what_cannot_be_read_does_not_stop_the_rest(tmp_path):
    written(tmp_path / "a.txt", b"\x89PNG\x00\x00")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    written(tmp_path / "c.txt", "text")
    first, second, third = read_documents([tmp_path])
    assert "binary" in first.reason
    assert "cannot be read (No such file" in second.reason
    assert third.text == "text"
    told = []
    (document,) = read_documents([tmp_path], on_failure=lambda *failure: told.append(failure))
    assert document == third
    assert told == [(first.document_id, first.reason), (second.document_id, second.reason)]


def test_a_file_whose_name_is_no_text_is_unreadable(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"x")
    (document,) = read_documents([tmp_path])
    assert document.document_id.endswith("caf\\xe9.txt")
    assert "rename" in document.reason


def test_the_content_hash_changes_with_the_content_and_with_nothing_else(tmp_path):
    first = read_one(written(tmp_path / "a.txt", "text"))
    assert read_one(written(tmp_path / "b.txt", "text")).content_hash == first.content_hash
    assert read_one(written(tmp_path / "a.txt", "texts")).content_hash != first.content_hash
    assert len(first.content_hash) == 32


def test_an_empty_file_is_a_document_without_passages(tmp_path):
    for suffix in (".txt", ".md", ".html", ".jsonl"):
        document = read_one(written(tmp_path / f"empty{suffix}", b" \n"))
        assert isinstance(document, Document)
        assert split_document(document, PassageSplitter(TOKENIZER, max_tokens=50)) == []


# Text


@pytest.mark.parametrize(
    "content",
    [
        "naïve 猫".encode(),
        codecs.BOM_UTF8 + "naïve 猫".encode(),
        "naïve 猫".encode("utf-16"),
        codecs.BOM_UTF16_BE + "naïve 猫".encode("utf-16-be"),
        "naïve 猫".encode("utf-32"),
    ],
    ids=["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"],
)
def test_encodings_are_told_by_their_mark_and_utf_8_is_the_default(tmp_path, content):
    assert read_one(written(tmp_path / "a.txt", content)).text == "naïve 猫"


def test_what_is_not_utf_8_is_read_as_latin_1_with_a_log_line(tmp_path, caplog):
    assert read_one(written(tmp_path / "a.txt", "café, “naïve”".encode("cp1252"))).text == "café, “naïve”"
    assert (
        read_one(written(tmp_path / "b.txt", "a caf\xe9 with \x81 in it".encode("latin-1"))).text[:6]
        == "a café"
    )
    assert caplog.text.count("read as Latin-1") == 2


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".jsonl"])
@pytest.mark.parametrize("content", [b"\x7fELF\x00\x01\x02", random.Random(0).randbytes(500)])
def test_binary_data_under_the_name_of_text_is_unreadable(tmp_path, suffix, content):
    assert "binary" in reason_of(written(tmp_path / f"a{suffix}", content))


def test_a_mark_that_lies_is_reported(tmp_path):
    assert "utf-16" in reason_of(written(tmp_path / "a.txt", codecs.BOM_UTF16_LE + b"odd"))


def test_line_ends_of_other_systems_become_ours(tmp_path):
    assert read_one(written(tmp_path / "a.txt", b"a\r\nb\rc")).text == "a\nb\nc"


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n## The *first* one ##\n\n# Second", "The *first* one"),
        ("```\n# code\n```\n\n# Real", "Real"),
        ("Underlined\n======\n", "Underlined"),
        ("---\nauthor: me\n---\n\n# Title", "Title"),
        ("no heading, #hash", ""),
    ],
)
def test_the_title_of_markdown_is_its_first_heading(tmp_path, text, title):
    document = read_one(written(tmp_path / "a.md", text))
    assert document.title == title
    assert document.text == text


# HTML and PDF

PAGE = """<!DOCTYPE html><html><head><title> A
  title </title><style>p {}</style><script>var x = "no";</script></head>
<body><!-- unseen --><h1>Head</h1><p>One <b>bold</b>
word.<br>Next line</p><script>no()</script><ul><li>first</li><li>second</li></ul>
<table><tr><td>a</td><td>b</td></tr></table><pre>  kept
    as is</pre><noscript>no</noscript>&eacute;&amp;</body></html>"""


def test_html_gives_its_title_and_what_is_seen(tmp_path):
    document = read_one(written(tmp_path / "a.html", PAGE))
    assert document.title == "A title"
    lines = [line.rstrip() for line in document.text.split("\n") if line.strip()]
    assert lines == [
        "Head", "One bold word.", "Next line", "first", "second", "a b", "  kept", "    as is", "é&",
    ]  # fmt: skip
    assert "\n\n" in document.text


def test_html_in_a_declared_encoding_is_decoded_by_it(tmp_path):
    page = '<html><head><meta charset="iso-8859-2"></head><body><p>Łódź</p></body></html>'
    assert read_one(written(tmp_path / "a.htm", page.encode("iso-8859-2"))).text == "Łódź"


def test_xhtml_and_text_that_looks_like_a_file_name_warn_about_nothing(tmp_path):
    xhtml = '<?xml version="1.0" encoding="utf-8"?><html><body><p>x</p></body></html>'
    assert read_one(written(tmp_path / "a.html", xhtml)).text.endswith("x")
    assert read_one(written(tmp_path / "b.html", "some/file.txt")).text == "some/file.txt"


def test_the_pages_of_a_pdf_are_kept(tmp_path):
    document = read_one(written(tmp_path / "a.pdf", pdf("First page.", "", "Third page.", title="On pages")))
    assert document.title == "On pages"
    passages = split_document(document, PassageSplitter(TOKENIZER, max_tokens=50))
    assert [(passage.text, passage.metadata["page"], passage.metadata["index"]) for passage in passages] == [
        ("First page.", 1, 0),
        ("Third page.", 3, 1),
    ]


def test_a_pdf_without_text_asks_for_text_recognition(tmp_path):
    assert "text recognition" in reason_of(written(tmp_path / "a.pdf", pdf("", "")))


@pytest.mark.parametrize("content", [b"", b"no pdf", pdf("page")[:200], b"%PDF-1.4\n" + bytes(500)])
def test_a_broken_pdf_is_unreadable(tmp_path, content):
    assert "PDF" in reason_of(written(tmp_path / "a.pdf", content))


def test_a_pdf_damaged_anywhere_never_stops_the_reading(tmp_path):
    sound, chance = pdf("Some text on a page.", "More."), random.Random(0)
    for _ in range(150):
        damaged = bytearray(sound)
        for _ in range(chance.randint(1, 12)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        read_one(written(tmp_path / "a.pdf", bytes(damaged)))


@pytest.mark.parametrize(("name", "package"), [("a.html", "bs4"), ("a.pdf", "pypdf")])
def test_a_missing_package_makes_a_file_unreadable_and_names_the_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    written(tmp_path / "b.txt", "text")
    written(tmp_path / name, "text")
    unreadable, document = read_documents([tmp_path])
    assert "rag_blockcache[documents]" in unreadable.reason
    assert document.text == "text"


# Ready passages


def test_lines_of_ready_passages_are_kept_whole(tmp_path):
    lines = [
        {"text": "word " * 500, "title": "Long", "id": 7, "metadata": {"lang": "en"}, "year": 2024},
        {"text": "Short. \u2028 Still the same line."},
    ]
    path = written(
        tmp_path / "a.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    )
    first, second = split_document(read_one(path), PassageSplitter(TOKENIZER, max_tokens=10))
    assert (first.text, first.title, first.passage_id) == ("word " * 500, "Long", "7")
    assert first.metadata == {"source": str(path), "index": 0, "lang": "en", "year": 2024, "id": 7}
    assert (second.text, second.title, second.passage_id) == ("Short. \u2028 Still the same line.", "", "")


def test_bad_lines_are_reported_with_their_number_and_the_others_kept(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        '{"text": "good"}\n{"text": \n\n["list"]\n{"title": "no text"}\n{"text": " "}\n'
        '{"text": "x", "title": 3}\n'
        '{"text": "x", "metadata": [1]}\n{"text": "also good"}',
    )
    document, *bad = read_documents([path])
    assert [passage.text for passage in document.extract.passages] == ["good", "also good"]
    assert [line.reason.partition(":")[0] for line in bad] == [
        f"line {number}" for number in (2, 4, 5, 6, 7, 8)
    ]
    assert {line.document_id for line in bad} == {str(path)}


# Passages


def document_of(text, suffix=".txt"):
    from rag_blockcache.jobs.extraction import Extract

    return Document(f"/folder/a{suffix}", "hash", Extract("Title", (text,)))


def test_passages_carry_title_source_and_index():
    passages = split_document(
        document_of("One sentence here. Another one there."), PassageSplitter(TOKENIZER, max_tokens=20)
    )
    assert [passage.text for passage in passages] == ["One sentence here.", "Another one there."]
    assert [passage.metadata for passage in passages] == [
        {"source": "/folder/a.txt", "index": index} for index in (0, 1)
    ]
    assert {passage.title for passage in passages} == {"Title"}


def test_markdown_is_cut_at_its_headings():
    text = "# One\n\nSome words.\n\n# Two\n\nOther words."
    texts = [
        p.text for p in split_document(document_of(text, ".md"), PassageSplitter(TOKENIZER, max_tokens=25))
    ]
    assert texts == ["# One\n\nSome words.", "# Two\n\nOther words."]


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 7}, {"max_tokens": 8, "overlap_tokens": 8}, {"max_tokens": 9, "overlap_tokens": -1}],
)
def test_a_splitter_that_cannot_work_is_refused(options):
    with pytest.raises(InvalidInputError, match=r"max_tokens|overlap_tokens"):
        PassageSplitter(TOKENIZER, **options)


class SlowTokenizer:
    """A tokenizer without a fast backend: words and single punctuation marks."""

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [len(word) for word in text.split()]


def test_a_slow_tokenizer_counts_too():
    splitter = PassageSplitter(SlowTokenizer(), max_tokens=8)
    texts = splitter.split(" ".join(["word"] * 20))
    assert [len(text.split()) for text in texts] == [8, 8, 4]


def test_truncation_and_padding_of_the_model_s_tokenizer_do_not_count_and_are_left_alone():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    assert max(map(num_tokens, PassageSplitter(tokenizer, max_tokens=20).split("word " * 30))) <= 20
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5


def solid(text):
    return "".join(text.split())


texts = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_categories=["Cs"]),
        st.sampled_from(list("abc .,\n\t#*`-|>[](){}1\r")),
    ),
    max_size=300,
)


@settings(max_examples=150, deadline=None)
@given(text=texts, max_tokens=st.integers(8, 60), is_markdown=st.booleans())
def test_pieces_keep_to_the_limit_lose_nothing_and_stay_in_order(text, max_tokens, is_markdown):
    pieces = PassageSplitter(TOKENIZER, max_tokens=max_tokens).split(text, is_markdown=is_markdown)
    assert all(0 < num_tokens(piece) <= max_tokens for piece in pieces)
    assert solid("".join(pieces)) == solid(text)


@settings(max_examples=100, deadline=None)
@given(text=texts, overlap=st.integers(1, 30), is_markdown=st.booleans())
def test_overlapping_pieces_keep_to_the_limit_and_cover_the_text_in_order(text, overlap, is_markdown):
    splitter = PassageSplitter(TOKENIZER, max_tokens=31, overlap_tokens=overlap)
    covered = place = 0
    for piece in splitter.split(text, is_markdown=is_markdown):
        assert 0 < num_tokens(piece) <= 31
        place = next(  # some place not before the last one, and no gap but white space
            found
            for found in range(place, covered + len(text))
            if text.startswith(piece, found) and not text[covered:found].strip()
        )
        covered = max(covered, place + len(piece))
    assert not text[covered:].strip()


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".md", ".html", ".pdf", ".jsonl"]))
def test_any_bytes_are_a_document_or_unreadable(tmp_path_factory, content, suffix):
    path = written(tmp_path_factory.mktemp("any") / f"a{suffix}", content)
    for found in read_documents([path]):
        assert isinstance(found, Document | UnreadableDocument)
        if isinstance(found, Document):
            split_document(found, PassageSplitter(TOKENIZER, max_tokens=30))
