"""Known passages are found in any prompt by their text, and nothing else is."""

import logging
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rag_blockcache import anchors, matcher, passage_registry
from rag_blockcache.anchors import WINDOW_BYTES, AnchorSet, candidate_anchors, window_hashes
from rag_blockcache.errors import InvalidInputError, StoreError
from rag_blockcache.matcher import Match, Matcher
from rag_blockcache.passage_registry import PassageRegistry

SOURCE = random.Random(0)
WORDS = ["".join(SOURCE.choices("etaoinshrdlu", k=SOURCE.randint(2, 9))) for _ in range(2000)]


def words(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture
def registry(tmp_path):
    with PassageRegistry(tmp_path) as opened:
        yield opened


def spans(prompt: str, matches: list[Match]) -> list[str]:
    return [prompt[match.start : match.stop] for match in matches]


# The reference: str.find and a loop over characters.


def num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def is_line(prompt: str, start: int, stop: int) -> bool:
    return prompt[start - 1 : start] in ("", "\n", "\r") and prompt[stop : stop + 1] in ("", "\n", "\r")


def reference(prompt: str, texts: dict[str, int], min_bytes: int, hints=frozenset()) -> set[tuple]:
    """Return start, stop, and whether it is a prefix; ``texts`` maps a text to the bytes that find it."""
    owner = [False] * len(prompt)
    found = set()
    start = 0
    while start < len(prompt):
        here = {text for text in texts if prompt.find(text, start) == start}
        here |= {
            hint
            for hint in hints
            if prompt.find(hint, start) == start
            and (num_bytes(hint) >= WINDOW_BYTES or is_line(prompt, start, start + len(hint)))
        }
        stop = start + max(map(len, here), default=0)
        if here:
            found.add((start, stop, False))
            owner[start:stop] = [True] * (stop - start)
        start = max(stop, start + 1)
    start = 0
    while start < len(prompt):
        end = start
        while end < len(prompt) and not owner[end]:
            end += 1
        longest = 0
        for text, needed in [*texts.items(), *((hint, min_bytes) for hint in hints)]:
            common = common_prefix(prompt[start:], text)
            if num_bytes(common) >= max(needed, min_bytes) and num_bytes(common[: end - start]) >= min_bytes:
                longest = max(longest, len(common[: end - start]))
        if longest:
            found.add((start, start + longest, True))
        start += max(longest, 1)
    return found


@st.composite
def prompts(draw) -> tuple[str, list[str]]:
    """Draw texts put together from a few parts, and a prompt of texts, cut texts and parts."""
    alphabet = draw(st.sampled_from(["a", "ab", "ab \n", "aé漢🙂", "abc\ud83d"]))
    parts = draw(st.lists(st.text(alphabet, min_size=1, max_size=30), min_size=1, max_size=5))
    pick = st.lists(st.sampled_from(parts), min_size=1, max_size=7).map("".join)
    texts = draw(st.lists(pick, min_size=1, max_size=7))
    whole = st.sampled_from(texts)
    cut = st.tuples(whole, st.integers(1, 200)).map(lambda drawn: drawn[0][: drawn[1]])
    pieces = draw(
        st.lists(st.one_of(whole, whole, cut, st.sampled_from(parts), st.just("\n")), min_size=1, max_size=8)
    )
    return "".join(pieces), texts


def offsets_of(opened: PassageRegistry) -> dict[str, int]:
    held = opened.anchors
    known = opened.texts_of({*held.base.hashes.tolist(), *held.recent.hashes.tolist()})
    return {
        each.text.decode("utf-8", "surrogatepass"): each.anchor_offset
        for sharing in known.values()
        for each in sharing
    }


def triples(matches: list[Match]) -> list[tuple]:
    return [(match.start, match.stop, match.is_prefix) for match in matches]


@given(prompts(), st.integers(48, 90), st.sampled_from(["strong", "weak"]))
@settings(max_examples=100, deadline=None)
@example(("a" * 200, ["a" * 48, "a" * 49, "a" * 130]), 48, "strong")
@example(("é" * 60 + "漢", ["é" * 60 + "漣"]), 48, "strong")  # two characters of three bytes, the first two
@example(("é" * 24 + "漢", ["é" * 24 + "漣"]), 50, "strong")  # of which they share
def test_what_is_found_is_what_str_find_finds(drawn, min_bytes, hashing):
    prompt, texts = drawn
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        if hashing == "weak":  # so weak that nearly every window of a prompt seems to be an anchor

            def weak(data):
                return window_hashes(data) % 3

            patch.setattr(anchors, "window_hashes", weak)
            patch.setattr(matcher, "window_hashes", weak)
        with PassageRegistry(directory) as opened:
            opened.add(texts)
            expected = {text.strip() for text in texts if num_bytes(text.strip()) >= WINDOW_BYTES}
            offsets = offsets_of(opened)
            assert set(offsets) == expected
            needed = {text: offset + WINDOW_BYTES for text, offset in offsets.items()}
            found = Matcher(opened, min_prefix_bytes=min_bytes).find(prompt)
    if hashing == "strong":
        assert triples(found) == sorted(reference(prompt, needed, min_bytes))
    else:  # chance may show the anchor of a text that is cut before it
        more = reference(prompt, dict.fromkeys(offsets, 0), min_bytes)
        assert {each for each in triples(found) if not each[2]} == {each for each in more if not each[2]}
    for match in found:
        assert match.text.startswith(prompt[match.start : match.stop])
        assert match.is_prefix == (match.text != prompt[match.start : match.stop])
        assert match.text in offsets


@given(prompts(), st.integers(48, 90))
@settings(max_examples=150, deadline=None)
@example(("no\nyes\nyes, yes\nyes", ["yes"]), 48)
def test_hints_are_found_unregistered(empty_registry, drawn, min_bytes):
    prompt, texts = drawn
    hints = {text.strip() for text in texts} - {""}
    found = Matcher(empty_registry, min_prefix_bytes=min_bytes).find(prompt, texts)
    assert triples(found) == sorted(reference(prompt, {}, min_bytes, hints))
    assert all(match.text in hints for match in found)


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory):
    with PassageRegistry(tmp_path_factory.mktemp("empty")) as opened:
        yield opened


# What prompts look like.


def test_passages_are_found_wherever_they_stand_and_as_often(registry):
    texts = [words(80, seed) for seed in range(5)]
    registry.add(texts)
    order = [3, 0, 3, 4]
    prompt = "Context:\n" + "\n\n".join(texts[number] for number in order) + "\n\nQuestion: why?"
    found = Matcher(registry).find(prompt)
    assert [match.text for match in found] == [texts[number] for number in order]
    assert spans(prompt, found) == [match.text for match in found]
    assert not any(match.is_prefix for match in found)


def test_white_space_around_a_passage_does_not_count(registry):
    text = words(30, 1)
    assert registry.add([f"\n  {text}\t\n", text, f"{text} "]) == 1
    assert spans(text, Matcher(registry).find(text)) == [text]


def test_a_changed_passage_is_not_found(registry):
    text = words(25, 1)  # too short for the part before the change to count
    registry.add([text])
    for place in (0, len(text) // 2, len(text) - 1):
        changed = text[:place] + "#" + text[place + 1 :]
        assert Matcher(registry).find(changed) == []


def test_positions_are_characters_whatever_stands_before(registry):
    text = "Größe und Maß: " + words(30, 1) + " 漢字🙂"
    registry.add([text])
    prompt = f"🙂 «né» \ud83d {text} 漢"
    [match] = Matcher(registry).find(prompt)
    assert (match.start, prompt[match.start : match.stop]) == (9, text)


@pytest.mark.parametrize("num_kept", [192, 300, 700])
def test_a_passage_cut_at_its_end_is_a_prefix(registry, num_kept):
    texts = [words(200, seed) for seed in range(3)]
    registry.add(texts)
    prompt = f"Context: {texts[0][:num_kept]}#\n\n{texts[1]}"
    cut, whole = Matcher(registry).find(prompt)
    assert cut == Match(9, 9 + num_kept, texts[0], is_prefix=True)
    assert (whole.text, whole.is_prefix) == (texts[1], False)


def test_a_stump_of_a_passage_is_not_worth_a_match(registry):
    text = words(200, 1)
    registry.add([text])
    assert Matcher(registry).find(text[:191] + "#") == []
    assert len(Matcher(registry, min_prefix_bytes=100).find(text[:191] + "#")) == 1


def test_a_prefix_ends_where_a_whole_passage_begins(registry):
    before, inner, after = words(200, 1), words(30, 2), words(200, 3)
    long = f"{before} {inner} {after}"
    registry.add([long, inner])
    found = Matcher(registry).find(long[:-5])
    assert [(match.text, match.is_prefix) for match in found] == [(long, True), (inner, False)]
    assert spans(long, found) == [f"{before} ", inner]


def test_a_passage_without_its_head_is_not_found(registry):
    header = words(60, 0)
    texts = [f"{header} {words(60, seed)}" for seed in range(1, 40)]
    registry.add(texts)
    offset = offsets_of(registry)[texts[-1]]
    assert offset > 192  # past the header
    found = Matcher(registry).find(texts[-1][offset:] + texts[-1][:offset])
    assert [match.start for match in found] == [len(texts[-1]) - offset]  # the header, by another's anchor


def test_of_nested_passages_the_longest_of_the_leftmost_wins(registry):
    inner, before, after = words(30, 1), words(30, 2), words(30, 3)
    registry.add([inner, f"{inner} {after}", f"{before} {inner}"])
    [match] = Matcher(registry).find(f"{inner} {after}")
    assert match.text == f"{inner} {after}"
    [match] = Matcher(registry).find(f"{before} {inner} {after}")
    assert match.text == f"{before} {inner}"


def test_passages_under_one_header_each_get_an_anchor_of_their_own(registry):
    header = "file_path: reports/2024.md\nauthor: Research and Development\nlicence: " + words(60, 0)
    texts = [f"{header}\n\n{words(60, seed)}" for seed in range(1, 200)]
    registry.add(texts)
    num_sharing = [
        len(registry.texts_of([anchor])[anchor]) for anchor in registry.anchors.recent.hashes.tolist()
    ]
    assert max(num_sharing) == 1
    prompt = "\n\n".join(texts)
    assert [match.text for match in Matcher(registry).find(prompt)] == texts


def test_texts_that_differ_in_their_last_byte_are_told_apart(registry):
    texts = [words(40, 1) + ending for ending in "abc"]
    registry.add(texts)
    for text in texts:
        assert [match.text for match in Matcher(registry).find(f"- {text}!")] == [text]


def test_one_passage_may_be_registered_in_several_forms(registry):
    text = words(60, 1)
    titled = f"Title of it\n{text}"
    registry.add([text, titled])
    assert Matcher(registry).find(f"Sources:\n{titled}")[0].text == titled
    assert Matcher(registry).find(f"Sources:\nOther title\n{text}")[0].text == text


def test_short_texts_are_not_kept_and_found_by_hints_where_they_fill_lines(registry):
    assert registry.add(["Ada wrote the note.", "é" * 23]) == 0
    prompt = "Sources:\n\nAda wrote the note.\n\nWho says 'Ada wrote the note.'?"
    assert Matcher(registry).find(prompt) == []
    assert triples(Matcher(registry).find(prompt, ["Ada wrote the note."])) == [(10, 29, False)]


def test_a_hint_that_is_cut_is_found_in_part(registry):
    text = words(200, 1)
    [match] = Matcher(registry).find(f"Context: {text[:250]}#", [text])
    assert match == Match(9, 259, text, is_prefix=True)


@pytest.mark.parametrize("prompt", ["", " ", "short", "\ud83d", "x" * 48])
def test_a_prompt_without_passages_has_no_matches(registry, prompt):
    registry.add([words(30, 1)])
    assert Matcher(registry).find(prompt, ["", "  "]) == []


def test_a_single_string_in_place_of_a_sequence_is_refused(registry):
    for call in (registry.add, registry.remove, lambda text: Matcher(registry).find("prompt", text)):
        with pytest.raises(InvalidInputError, match="sequence"):
            call("a single text")
    with pytest.raises(InvalidInputError, match="min_prefix_bytes is 47"):
        Matcher(registry, min_prefix_bytes=47)


@pytest.mark.parametrize("sharing", [["a" * size for size in range(48, 400)], ["a" * 47 + "b" * 300]])
def test_a_prompt_made_to_cost_time_is_done_with_soon(registry, sharing):
    registry.add(sharing)
    prompt = ("a" * 99 + "#") * 1000
    begin = time.perf_counter()
    Matcher(registry).find(prompt, sharing)
    assert time.perf_counter() - begin < 5


# The registry.


def test_what_was_added_is_there_when_the_directory_is_opened_again(tmp_path):
    texts = [words(60, seed) for seed in range(3)]
    with PassageRegistry(tmp_path) as opened:
        assert opened.add(texts) == 3
    with PassageRegistry(tmp_path) as opened:
        assert (len(opened), opened.add(texts)) == (3, 0)
        assert [match.text for match in Matcher(opened).find("\n".join(texts))] == texts


def test_what_was_removed_is_not_found_and_can_come_back(registry):
    texts = [words(60, seed) for seed in range(3)]
    registry.add(texts)
    prompt = "\n".join(texts)
    assert len(Matcher(registry).find(prompt)) == 3
    assert registry.remove([f" {texts[1]} ", "unknown"]) == 1
    assert registry.remove([]) == 0
    assert (texts[1] in registry, texts[0] in registry, 5 in registry, len(registry)) == (
        False,
        True,
        False,
        2,
    )
    assert [match.text for match in Matcher(registry).find(prompt)] == [texts[0], texts[2]]
    registry.add([texts[1]])
    assert [match.text for match in Matcher(registry).find(prompt)] == texts


def test_what_another_process_adds_or_removes_is_seen_at_once(registry, tmp_path):
    text = words(60, 1)
    found = Matcher(registry)
    assert found.find(text) == []
    with PassageRegistry(tmp_path) as other:  # connections of its own, as a process would have
        other.add([text])
        assert len(found.find(text)) == 1
        other.remove([text])
        assert found.find(text) == []
        other.add([words(60, 2)])  # may not take the row number of the removed one
        assert len(found.find(words(60, 2))) == 1


def test_many_new_texts_are_taken_in_at_once(registry, monkeypatch):
    monkeypatch.setattr(passage_registry, "_FAR_BEHIND", 20)
    registry.add([words(20, 0)])
    assert len(registry.anchors) == 1
    registry.add([words(20, seed) for seed in range(1, 50)])
    assert len(registry.anchors) == 50


def test_anchors_of_removed_texts_do_not_pile_up(registry, monkeypatch):
    monkeypatch.setattr(anchors, "_MAX_RECENT", 10)
    for start in range(0, 400, 20):
        texts = [words(20, seed) for seed in range(start, start + 20)]
        registry.add(texts)
        assert len(Matcher(registry).find("\n".join(texts))) == 20
        registry.remove(texts)
    assert len(registry.anchors) <= 60


def test_look_ups_go_on_while_another_thread_adds(registry):
    texts = [words(40, seed) for seed in range(2500)]
    registry.add(texts[:1])
    found, stop, errors = Matcher(registry), threading.Event(), []

    def look_up():
        while not stop.is_set():
            if spans(texts[0], found.find(texts[0])) != [texts[0]]:
                errors.append("lost the first text")

    readers = [threading.Thread(target=look_up) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for start in (0, 1200):
            registry.add(texts[start : start + 1300])
            last = texts[start + 1299]
            assert [match.text for match in found.find(f"- {last}")] == [last]
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not errors
    assert len(registry.anchors) == 2500


def test_a_look_up_does_not_wait_for_a_long_transaction(registry, tmp_path):
    text = words(60, 1)
    registry.add([text])
    with PassageRegistry(tmp_path) as other, other._writer.transaction():
        assert len(Matcher(registry).find(text)) == 1


def test_a_damaged_text_is_named_and_not_matched(registry, tmp_path, caplog):
    text = words(100, 1)
    registry.add([text])
    with sqlite3.connect(tmp_path / "texts.sqlite") as connection:
        connection.execute("UPDATE texts SET text = ?", (text.encode()[:-1] + b"\xff",))
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert Matcher(registry).find(text) == []
    assert "is damaged" in caplog.text
    assert "texts.sqlite" in caplog.text


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "texts.sqlite").write_bytes(b"no database at all, but something else" * 50)
    with pytest.raises(StoreError, match=r"texts\.sqlite"):
        PassageRegistry(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another"):
        PassageRegistry(tmp_path / "file")


# Anchors.


@given(st.binary(max_size=300), st.binary(min_size=48, max_size=60), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_a_window_has_the_same_hash_wherever_it_stands(before, window, after):
    hashes = window_hashes(before + window + after)
    alone = window_hashes(window)
    assert hashes[len(before) : len(before) + len(alone)].tolist() == alone.tolist()
    assert len(hashes) == len(before + window + after) - WINDOW_BYTES + 1


def test_hashes_of_similar_windows_look_random():
    data = bytes(256)
    windows = [
        data[:place] + bytes([value]) + data[place + 1 : 48] for place in range(48) for value in range(1, 256)
    ]
    hashes = np.array([window_hashes(window)[0] for window in windows])
    bits = (hashes[:, None] >> np.arange(64)) & 1
    assert len(np.unique(hashes)) == len(hashes)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.03  # every bit, the lowest too


def test_every_byte_can_choose_the_anchor():
    """Of two texts that differ in one byte, at least one proposal differs, so both can be told apart."""
    text = words(60, 1).encode()[:300]
    proposed = {anchor for _, anchor in candidate_anchors(text)}
    for place in range(len(text)):
        changed = text[:place] + b"#" + text[place + 1 :]
        assert {anchor for _, anchor in candidate_anchors(changed)} - proposed


@given(st.lists(st.lists(st.integers(-50, 50), max_size=30), max_size=8), st.lists(st.integers(-60, 60)))
@settings(max_examples=100, deadline=None)
def test_an_anchor_set_answers_as_a_set_does(added, asked):
    spread = 2**57 + 1  # so that the highest bits differ
    added, asked = (
        [[anchor * spread for anchor in some] for some in added],
        [place * spread for place in asked],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchors, "_MAX_RECENT", 40)
        held = AnchorSet()
        for some in added:
            held = held.with_added(np.array(some, np.int64))
    known = {anchor for some in added for anchor in some}
    expected = [place for place, anchor in enumerate(asked) if anchor in known]
    assert held.positions(np.array(asked, np.int64)).tolist() == expected
    assert len(held.recent.hashes) <= 40


def test_adding_one_anchor_leaves_the_large_array_alone():
    large = AnchorSet().with_added(np.arange(100_000))
    assert large.with_added(np.array([5])).base is large.base
    assert len(large) == 100_000


def test_a_million_anchors_fit_into_16_megabytes_and_are_looked_up_in_milliseconds():
    source = np.random.default_rng(0)
    held = AnchorSet().with_added(source.integers(-(2**63), 2**63 - 1, 1_000_000))
    held = held.with_added(source.integers(-(2**63), 2**63 - 1, 8000))
    assert held.num_bytes <= 16 * 10**6
    prompt = source.integers(32, 127, 22 * 1024).astype(np.uint8).tobytes()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        held.positions(window_hashes(prompt))
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05  # 3 ms on an idle core, see benchmarks/bench_matching.py


def test_importing_the_matcher_loads_no_torch():
    code = "import sys, rag_blockcache.matcher; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
