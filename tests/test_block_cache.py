"""BlockCache, the public face: answers, streams, batches, scores, counts, isolation, and faults."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import architectures
import pytest
import torch
from conftest import byte_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList

from rag_blockcache import BlockCache, Passage, Question
from rag_blockcache.break_even import _Costs
from rag_blockcache.errors import ContextTooLongError, InvalidInputError, OutOfSpaceError
from rag_blockcache.repair import expected_work

PASSAGES = [
    "Ada wrote the note.",
    Passage("The mill has wheels.", title="The mill"),
    "A part still works: é 日本.",
]
POLICIES = ["full", "block", "link-3", "auto"]


def open_cache(tiny_model, tiny_tokenizer, directory=None, **options):
    return BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer, **options)


def length(cache, question="Who?", passages=PASSAGES, **chat):
    return sum(map(len, cache.segments(question, passages, **chat)))


def used(answer):
    return answer.num_hits, answer.num_misses, answer.num_reused_tokens, answer.num_computed_tokens


class Slow(LogitsProcessor):
    """Makes every step take a while, and counts them."""

    def __init__(self, seconds=0.02):
        self.seconds, self.num_steps = seconds, 0

    def __call__(self, input_ids, scores):
        self.num_steps += 1
        time.sleep(self.seconds)
        return scores


class Seen(LogitsProcessor):
    """Keeps the tokens and logits of the latest step."""

    def __call__(self, input_ids, scores):
        self.input_ids, self.scores = input_ids.clone(), scores.clone()
        return scores


class Failing(LogitsProcessor):
    """Fails at a later step."""

    def __call__(self, input_ids, scores):
        raise LookupError("no such word")


@pytest.fixture
def cheap(monkeypatch):
    """Makes reuse pay from the first token on, so that ``auto`` does not depend on this machine."""
    from rag_blockcache.break_even import BreakEven

    monkeypatch.setattr(BreakEven, "pays", lambda *numbers: True)


# Counts


def test_counts_add_up_to_the_prompt_for_every_kind_of_request(tiny_cache, cheap):
    total = length(tiny_cache)
    preamble, *blocks, _ = map(len, tiny_cache.segments("Who?", PASSAGES))
    for policy, reused in (("block", preamble + sum(blocks)), ("link-3", preamble + sum(blocks) - 9)):
        for passage in PASSAGES:
            tiny_cache.store.pop(tiny_cache.block(passage).block_id, None)
        for block_id in list(tiny_cache.store):
            del tiny_cache.store[block_id]
        first = tiny_cache.generate("Who?", PASSAGES, policy=policy, max_new_tokens=1)
        assert used(first) == (0, 3, 0, total)
        tiny_cache._kept.clear()
        again = tiny_cache.generate("Who?", PASSAGES, policy=policy, max_new_tokens=1)
        assert used(again) == (3, 0, reused, total - reused)
    assert used(tiny_cache.generate("Who?", PASSAGES, policy="full", max_new_tokens=1)) == (0, 0, 0, total)


def test_mixed_and_repeated_passages_are_counted_each(tiny_cache):
    tiny_cache.prefill(PASSAGES[:1])
    passages = [PASSAGES[0], "New.", PASSAGES[0], "New."]
    answer = tiny_cache.generate("Who?", passages, policy="block", max_new_tokens=1)
    assert used(answer)[:2] == (2, 2)
    block = len(tiny_cache.block(PASSAGES[0]).token_ids)
    assert answer.num_reused_tokens == 2 * block
    assert answer.num_reused_tokens + answer.num_computed_tokens == length(tiny_cache, passages=passages)


def test_a_system_prompt_and_a_history_leave_blocks_as_they_are(tiny_cache):
    tiny_cache.prefill(PASSAGES)
    chat = {"system_prompt": "Be brief.", "chat_history": [{"role": "user", "content": "Hello."}]}
    answer = tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1, **chat)
    assert used(answer)[:2] == (3, 0)
    assert answer.num_reused_tokens + answer.num_computed_tokens == length(tiny_cache, **chat)
    num_blocks = len(tiny_cache.store)
    tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1, **chat)
    assert len(tiny_cache.store) == num_blocks, "what holds a history is not stored"


@pytest.mark.parametrize("passages", [[], iter(PASSAGES), tuple(PASSAGES)], ids=["none", "iterator", "tuple"])
def test_passages_may_be_any_iterable(passages, tiny_cache):
    answer = tiny_cache.generate("Who?", passages, policy="block", max_new_tokens=2)
    assert answer.num_misses in (0, 3)
    assert len(answer.token_ids) == 2


def test_times_add_up_to_the_first_token(tiny_cache):
    answer = tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=3)
    parts = (
        answer.match_seconds,
        answer.load_seconds,
        answer.encode_seconds,
        answer.assemble_seconds,
        answer.final_block_seconds,
    )
    assert min(parts) >= 0
    assert sum(parts) <= answer.ttft_seconds
    assert answer.decode_tokens_per_second > 0


# Prefill


def test_prefill_skips_what_is_stored_and_repeated_and_reports_it(tiny_cache):
    seen = []
    report = tiny_cache.prefill([*PASSAGES, PASSAGES[0]], progress=seen.append)
    assert (report.num_passages, report.num_encoded, report.num_skipped) == (4, 3, 1)
    assert report.num_tokens == sum(len(tiny_cache.block(passage).token_ids) for passage in PASSAGES)
    assert report.num_bytes == report.num_tokens * tiny_cache.model.kv_bytes_per_token
    assert (seen[-1].num_done, seen[-1].num_total) == (4, 4)
    again = tiny_cache.prefill(iter(PASSAGES), progress=seen.append)
    assert (again.num_encoded, again.num_skipped, again.num_tokens) == (0, 3, 0)
    assert seen[-1].num_total is None


def test_a_block_has_the_tokens_and_name_that_prompts_use(tiny_cache):
    tiny_cache.prefill(PASSAGES)
    for passage, segment in zip(PASSAGES, tiny_cache.segments("Who?", PASSAGES)[1:-1], strict=True):
        block = tiny_cache.block(passage)
        assert list(block.token_ids) == segment
        assert block.block_id in tiny_cache.store


@pytest.mark.parametrize("passages", ["one string", Passage("one")])
def test_one_passage_is_not_a_sequence_of_passages(passages, tiny_cache):
    for call in (
        tiny_cache.prefill,
        lambda p: tiny_cache.generate("Who?", p),
        lambda p: tiny_cache.segments("Who?", p),
    ):
        with pytest.raises(InvalidInputError, match="wrap a single passage in a list"):
            call(passages)


def test_a_passage_beyond_the_window_is_refused_by_its_number(tiny_cache):
    with pytest.raises(ContextTooLongError, match="passage 1 has"):
        tiny_cache.prefill(["short", "long " * 1000])


# The context window


def test_a_window_that_is_exactly_full_is_answered_and_one_token_more_is_not(tiny_cache):
    room = tiny_cache.model.max_length - length(tiny_cache)
    question = "Who?" + "?" * (room - 5)
    for policy in ("full", "block"):
        answer = tiny_cache.generate(question, PASSAGES, max_new_tokens=5, policy=policy, eos_token_id=None)
        assert len(answer.token_ids) == 5
    with pytest.raises(ContextTooLongError, match="smaller max_new_tokens"):
        tiny_cache.generate(question, PASSAGES, max_new_tokens=6)


def test_a_prompt_that_is_too_long_stores_nothing(tiny_cache):
    for call in (tiny_cache.generate, tiny_cache.stream, tiny_cache.first_logits):
        with pytest.raises(ContextTooLongError):
            call("Who? " * 500, PASSAGES)
    with pytest.raises(ContextTooLongError):
        tiny_cache.generate_batch([("Who?", PASSAGES), ("Who? " * 500, PASSAGES)])
    with pytest.raises(ContextTooLongError):
        tiny_cache.score("Who?", PASSAGES, "a" * 2048)
    assert len(tiny_cache.store) == 0


@pytest.mark.parametrize("max_new_tokens", [0, -1])
def test_an_answer_needs_a_token(max_new_tokens, tiny_cache):
    with pytest.raises(InvalidInputError, match="at least 1"):
        tiny_cache.generate("Who?", PASSAGES, max_new_tokens=max_new_tokens)


# Batches


def test_a_batch_gives_the_tokens_of_one_at_a_time(tiny_model, tiny_tokenizer):
    requests = [
        ("Who?", PASSAGES),
        ("Where was it printed, and when, and by whom?", [PASSAGES[0], PASSAGES[0], "New."]),
        ("Why?", []),
        ("Who?", [PASSAGES[2]]),
    ]
    for policy in POLICIES[:3]:
        cache = open_cache(tiny_model, tiny_tokenizer)
        cache.prefill(PASSAGES[:1])
        options = {"policy": policy, "max_new_tokens": 12, "repetition_penalty": 1.3}
        together = cache.generate_batch(requests, **options)
        for (question, passages), answer in zip(requests, together, strict=True):
            alone = cache.generate(question, passages, **options)
            assert (answer.token_ids, answer.text, answer.finish_reason) == (
                alone.token_ids,
                alone.text,
                alone.finish_reason,
            )
            assert answer.num_reused_tokens + answer.num_computed_tokens == length(cache, question, passages)


def test_rows_of_a_batch_end_where_they_end_alone(tiny_cache):
    requests = [("Who?", PASSAGES), ("Where was it printed?", PASSAGES[:1]), ("Why?", [])]
    ascii_only = {"prefix_allowed_tokens_fn": lambda row, ids: list(range(5, 99)), "max_new_tokens": 16}
    texts = [answer.text for answer in tiny_cache.generate_batch(requests, policy="full", **ascii_only)]
    stops = {"stop_strings": [texts[0][3:5]]}
    eos = {"eos_token_id": tiny_cache.generate(*requests[1], policy="full", **ascii_only).token_ids[5]}
    for ends in (stops, eos, {**stops, **eos}, {**stops, "pad_token_id": eos["eos_token_id"]}):
        together = tiny_cache.generate_batch(requests, policy="full", **ascii_only, **ends)
        for (question, passages), answer in zip(requests, together, strict=True):
            alone = tiny_cache.generate(question, passages, policy="full", **ascii_only, **ends)
            assert (answer.token_ids, answer.text, answer.finish_reason) == (
                alone.token_ids,
                alone.text,
                alone.finish_reason,
            )


def test_what_fills_a_shorter_row_is_no_token_that_its_prompt_does_not_hold(tiny_cache):
    requests = [("Who?", PASSAGES), ("Why?", [])]
    seen = Seen()
    options = {"logits_processor": LogitsProcessorList([seen]), "max_new_tokens": 1, "pad_token_id": 250}
    tiny_cache.generate_batch(requests, policy="full", **options)
    prompt = {token for segment in tiny_cache.segments(*requests[1]) for token in segment}
    assert set(seen.input_ids[1].tolist()) == prompt


def test_an_empty_batch_has_no_answers(tiny_cache):
    assert tiny_cache.generate_batch([]) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_memory_that_holds_anything_does_not_reach_a_batch(attention, tiny_tokenizer, monkeypatch):
    network = architectures.accepted("mistral-window")
    network.set_attn_implementation(attention)
    cache = open_cache(network, tiny_tokenizer)
    requests = [("Who?", PASSAGES), ("W?", [])]
    expected = [
        answer.token_ids for answer in cache.generate_batch(requests, policy="block", max_new_tokens=5)
    ]
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, **o: (
            empty(*shape, **o).fill_(torch.nan) if o.get("dtype") == torch.float32 else empty(*shape, **o)
        ),
    )
    assert [
        answer.token_ids for answer in cache.generate_batch(requests, policy="block", max_new_tokens=5)
    ] == expected


def test_a_batch_of_prompts_on_both_sides_of_a_longrope_bound_is_right(tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")
    cache = open_cache(network, tiny_tokenizer, preamble="", passage_format="plain", blocks_see="themselves")
    requests = [("Where? " * 20, ["Ada."]), ("Who?", ["Ada wrote."])]
    seen_scores = Seen()
    options = {"policy": "block", "max_new_tokens": 1, "logits_processor": LogitsProcessorList([seen_scores])}
    cache.generate_batch(requests, **options)
    # With one passage and no preamble, blocks are plain causal attention; the model turns all rows alike.
    ids = [torch.tensor([t for s in cache.segments(*request) for t in s]) for request in requests]
    width = max(map(len, ids))
    padded = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in ids])
    seen = torch.stack([torch.arange(width) >= width - len(row) for row in ids]).long()
    cut = [len(cache.segments(*request)[0]) for request in requests]
    assert width > 128 > len(ids[1])
    mask = seen.bool()[:, None, None] & torch.ones(width, width).tril().bool()
    for row, (request, first) in enumerate(zip(requests, cut, strict=True)):
        start = width - len(ids[row]) + first
        mask[row, 0, start : start + len(cache.segments(*request)[1]), :start] = (
            False  # the passage sees itself
        )
    mask |= torch.eye(width).bool()
    with torch.inference_mode():
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = network(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    torch.testing.assert_close(seen_scores.scores, logits, rtol=1e-3, atol=1e-4)


# Logits and scores


def test_the_first_logits_choose_the_first_token(tiny_cache, cheap):
    for policy in POLICIES:
        logits = tiny_cache.first_logits("Who?", PASSAGES, policy=policy)
        assert (logits.shape, logits.dtype) == ((architectures.VOCAB_SIZE,), torch.float32)
        answer = tiny_cache.generate("Who?", PASSAGES, policy=policy, max_new_tokens=1)
        assert int(logits.argmax()) == answer.token_ids[0]


@pytest.mark.parametrize("continuation", ["Ada.", [70, 71, 72], [70]])
def test_a_score_is_that_of_the_bare_model_forced_to_the_continuation(continuation, tiny_model, tiny_cache):
    prompt = [token for segment in tiny_cache.segments("Who?", PASSAGES) for token in segment]
    forced = (
        continuation if isinstance(continuation, list) else list(tiny_cache.prompt.text_tokens(continuation))
    )
    with torch.inference_mode():
        logits = tiny_model(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logits[range(len(forced)), forced]
    scores = tiny_cache.score("Who?", PASSAGES, continuation, policy="full")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["block", "link-3"])
def test_a_score_under_reuse_is_that_of_the_tokens_it_would_choose(policy, tiny_cache):
    answer = tiny_cache.generate("Who?", PASSAGES, policy=policy, max_new_tokens=6)
    scores = tiny_cache.score("Who?", PASSAGES, answer.token_ids, policy=policy)
    first = tiny_cache.first_logits("Who?", PASSAGES, policy=policy).log_softmax(-1)
    torch.testing.assert_close(scores[0], first.max(), rtol=1e-4, atol=1e-4)
    other = [answer.token_ids[0], answer.token_ids[1] ^ 1]
    assert tiny_cache.score("Who?", PASSAGES, other, policy=policy)[1] < scores[1]


def test_an_empty_continuation_has_no_score(tiny_cache):
    for nothing in ("", []):
        with pytest.raises(InvalidInputError, match="continuation is empty"):
            tiny_cache.score("Who?", PASSAGES, nothing)


# Streams


@pytest.mark.parametrize(
    "options", [{}, {"stop_strings": "e"}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_pieces_of_a_stream_are_the_text_of_its_answer(options, tiny_cache):
    torch.manual_seed(1)
    with tiny_cache.stream("Who?", PASSAGES, policy="block", max_new_tokens=24, **options) as stream:
        pieces = list(stream)
    assert "".join(pieces) == stream.answer.text
    torch.manual_seed(1)
    answer = tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=24, **options)
    assert (stream.answer.token_ids, stream.answer.text) == (answer.token_ids, answer.text)


def test_pieces_come_while_the_answer_is_made(tiny_cache):
    slow = Slow()
    letters = {"prefix_allowed_tokens_fn": lambda row, ids: list(range(5, 99))}
    stream = tiny_cache.stream(
        "Who?",
        PASSAGES,
        policy="block",
        max_new_tokens=50,
        logits_processor=LogitsProcessorList([slow]),
        **letters,
    )
    assert next(stream)
    assert slow.num_steps < 25
    assert stream.answer is None
    stream.close()


def test_closing_a_stream_stops_within_a_token_and_frees_its_thread(tiny_cache):
    slow = Slow()
    options = {"logits_processor": LogitsProcessorList([slow]), "eos_token_id": None}
    stream = tiny_cache.stream("Who?", PASSAGES, policy="block", max_new_tokens=500, **options)
    next(stream)
    num_steps = slow.num_steps
    stream.close()
    assert slow.num_steps <= num_steps + 2
    assert stream.answer.finish_reason == "cancelled"
    assert len(stream.answer.token_ids) == slow.num_steps
    assert "rag-blockcache-answer" not in {thread.name for thread in threading.enumerate()}
    stream.close()


def test_a_stream_that_nobody_holds_stops_at_once(tiny_cache):
    slow = Slow()
    gc.disable()  # no cycle may keep it: it goes when the last reference goes
    try:
        stream = tiny_cache.stream(
            "Who?",
            PASSAGES,
            max_new_tokens=500,
            logits_processor=LogitsProcessorList([slow]),
            eos_token_id=None,
        )
        next(stream)
        thread, held = stream._thread, weakref.ref(stream)
        del stream
        assert held() is None
        thread.join(timeout=10)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert slow.num_steps < 100


def test_an_error_of_the_worker_reaches_the_reader(tiny_cache):
    stream = tiny_cache.stream("Who?", PASSAGES, logits_processor=LogitsProcessorList([Failing()]))
    with pytest.raises(LookupError, match="no such word"):
        list(stream)
    assert stream.answer is None


def test_what_is_wrong_with_a_request_is_said_before_the_stream_begins(tiny_cache):
    for options in (
        {"temprature": 1},
        {"num_beams": 2},
        {"policy": "blok"},
        {"max_new_tokens": 0},
        {"stop_strings": [""]},
    ):
        with pytest.raises(InvalidInputError):
            tiny_cache.stream("Who?", PASSAGES, **options)
    with pytest.raises(InvalidInputError, match="question is empty"):
        tiny_cache.stream(" ", PASSAGES)


def test_beams_of_a_configuration_cannot_be_streamed_either(tiny_cache):
    from transformers import GenerationConfig

    with pytest.raises(InvalidInputError, match="beam search"):
        tiny_cache.stream("Who?", PASSAGES, generation_config=GenerationConfig(num_beams=2))


# Whose blocks


def test_eight_threads_get_the_answers_of_one(tiny_model, tiny_tokenizer, tmp_path):
    requests = [(f"Who is {i}?", [PASSAGES[i % 3], f"Passage {i % 4}."]) for i in range(16)]
    alone = open_cache(tiny_model, tiny_tokenizer)
    expected = [alone.generate(*r, policy="block", max_new_tokens=6).token_ids for r in requests]
    found: dict[int, list[int]] = {}
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:

        def work(first):
            for i in range(first, len(requests), 8):
                if i % 2:
                    found[i] = cache.generate(*requests[i], policy="block", max_new_tokens=6).token_ids
                else:
                    stream = cache.stream(*requests[i], policy="block", max_new_tokens=6)
                    list(stream)
                    found[i] = stream.answer.token_ids

        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(len(requests))] == expected


def test_threads_do_not_disturb_rotary_angles_that_change_with_length(tiny_tokenizer):
    network = architectures.accepted("phi3-longrope")
    cache = open_cache(network, tiny_tokenizer, preamble="", passage_format="plain", blocks_see="themselves")
    questions = ["Who?", "Where? " * 20]
    expected = [cache.first_logits(question, PASSAGES[:1], policy="block") for question in questions]
    wrong = []

    def work(i):
        for _ in range(15):
            if not torch.allclose(
                cache.first_logits(questions[i], PASSAGES[:1], policy="block"), expected[i], atol=1e-4
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("changed", ["salt", "weights", "dtype", "tokenizer", "preamble", "themselves"])
def test_blocks_of_another_kind_are_misses(changed, tiny_model, tiny_tokenizer, tmp_path):
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:
        cache.prefill(PASSAGES)
    network = architectures.build("Llama", {"max_position_embeddings": 2048})
    tokenizer, options = tiny_tokenizer, {}
    if changed == "salt":
        options["salt"] = "another tenant"
    elif changed == "weights":
        network.lm_head.weight.data[0, 0] += 1
    elif changed == "dtype":
        network = network.to(torch.bfloat16)
    elif changed == "tokenizer":
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["another"])
    else:
        options["blocks_see"] = changed
    with open_cache(network, tokenizer, tmp_path, **options) as other:
        answer = other.generate("Who?", PASSAGES, policy="block", max_new_tokens=1)
        assert used(answer)[:2] == (0, 3)
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:
        assert used(cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1))[:2] == (3, 0)


def test_the_same_model_loaded_again_finds_its_blocks(tiny_model_path, tiny_model, tiny_tokenizer, tmp_path):
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:
        cache.prefill(PASSAGES)
        fingerprint = cache.fingerprint
    tokenizer = byte_tokenizer()
    tokenizer(
        ["a", "abc"], padding=True, truncation=True, max_length=2
    )  # settings of a call, not of the tokenizer
    for model, options in ((tiny_model, {"tokenizer": tokenizer}), (tiny_model_path, {"device": "cpu"})):
        with BlockCache(model, tmp_path, **options) as cache:
            answer = cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1)
            assert used(answer)[:2] == (3, 0)
    assert cache.fingerprint == fingerprint


# Faults


def test_a_damaged_block_is_encoded_again_and_the_answer_is_right(tiny_model, tiny_tokenizer, tmp_path):
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:
        expected = cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=6)
        num_blocks = len(cache.store)
    for path in (tmp_path / "blocks").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000 and ".db" not in path.name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
    with open_cache(tiny_model, tiny_tokenizer, tmp_path) as cache:
        answer = cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=6)
        assert answer.num_misses > 0, "the damage must have been noticed"
        assert answer.token_ids == expected.token_ids
        assert len(cache.store) == num_blocks
        for passage in PASSAGES:
            cache.store.verify(cache.block(passage).block_id)


def test_a_full_disk_does_not_cost_the_answer(tiny_cache, monkeypatch, caplog):
    expected = tiny_cache.generate("Who?", PASSAGES, policy="full", max_new_tokens=4)
    del expected

    def full(*_, **__):
        raise OutOfSpaceError("no space left")

    monkeypatch.setattr(tiny_cache.store, "put_many", full)
    answer = tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=4)
    assert used(answer)[:2] == (0, 3)
    assert len(answer.token_ids) == 4
    assert "were not stored: no space left" in caplog.text
    with pytest.raises(OutOfSpaceError):
        tiny_cache.prefill(PASSAGES)


@pytest.mark.parametrize("on_disk", [False, True])
def test_no_memory_for_blocks_costs_time_and_nothing_else(on_disk, tiny_model, tiny_tokenizer, tmp_path):
    expected = open_cache(tiny_model, tiny_tokenizer).generate(
        "Who?", PASSAGES, policy="block", max_new_tokens=6
    )
    directory = tmp_path if on_disk else None
    with open_cache(tiny_model, tiny_tokenizer, directory, memory_budget_bytes=0) as cache:
        answers = [cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=6) for _ in range(2)]
    assert [answer.token_ids for answer in answers] == [expected.token_ids] * 2
    assert answers[1].num_hits == (3 if on_disk else 0)


def test_many_system_prompts_stay_within_the_budget(tiny_model, tiny_tokenizer, tmp_path):
    budget = 600_000
    options = {"disk_budget_bytes": budget, "memory_budget_bytes": budget}
    with open_cache(tiny_model, tiny_tokenizer, tmp_path, **options) as cache:
        for i in range(12):
            cache.generate(
                "Who?", PASSAGES[:1], policy="block", max_new_tokens=1, system_prompt=f"You are {i}. " * 8
            )
        assert cache.store.stats().disk.num_pinned <= 1
        assert cache.store.size_bytes <= budget
        assert used(cache.generate("Who?", PASSAGES[:1], policy="block", max_new_tokens=1))[0] == 1


def test_what_is_wrong_with_a_model_leaves_no_directory_behind(tiny_model, tmp_path):
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        BlockCache(tiny_model, tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


# Models as users have them


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(tiny_tokenizer):
    network = architectures.build("Llama", {"attention_dropout": 0.5})
    expected = open_cache(network, tiny_tokenizer).first_logits("Who?", PASSAGES[:1], policy="block")
    network.train()
    network.model.layers[1].eval()
    cache = open_cache(network, tiny_tokenizer)
    assert torch.equal(cache.first_logits("Who?", PASSAGES[:1], policy="block"), expected)
    cache.generate("Who?", PASSAGES[:1], policy="block", max_new_tokens=2)
    assert network.training
    assert network.model.layers[0].self_attn.training
    assert not network.model.layers[1].self_attn.training
    network(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert network.lm_head.weight.grad is not None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kinds_of_attention_and_numbers_are_served(attention, dtype, tiny_tokenizer):
    network = architectures.accepted("mistral-window", dtype)
    network.set_attn_implementation(attention)
    cache = open_cache(network, tiny_tokenizer, preamble="", passage_format="plain", blocks_see="themselves")
    link, full = (cache.first_logits("Who?", PASSAGES, policy=policy) for policy in ("link-3", "full"))
    assert link.isfinite().all()
    assert full.isfinite().all()
    assert network.config._attn_implementation == attention
    assert len(cache.generate_batch([("Who?", PASSAGES), ("?", [])], policy="block", max_new_tokens=3)) == 2


def test_a_model_that_accelerate_has_dispatched_is_served(tiny_tokenizer):
    from accelerate import dispatch_model

    network = architectures.build("Llama", {})
    expected = open_cache(network, tiny_tokenizer).first_logits("Who?", PASSAGES[:1], policy="block")
    network = dispatch_model(network, {"": "cpu"}, force_hooks=True)
    cache = open_cache(network, tiny_tokenizer)
    torch.testing.assert_close(cache.first_logits("Who?", PASSAGES[:1], policy="block"), expected)


# Below the break-even


def test_below_the_break_even_auto_prefills_in_full_and_says_so(tiny_cache):
    tiny_cache._break_even.pays = lambda *numbers: False
    tiny_cache.prefill(PASSAGES)
    tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1)  # stores the preamble
    answer = tiny_cache.generate("Who?", PASSAGES, max_new_tokens=1)
    assert (answer.policy, answer.policy_reason) == ("full", "so few tokens are computed sooner than reused")
    assert used(answer) == (len(PASSAGES), 0, 0, length(tiny_cache))
    named = tiny_cache.generate("Who?", PASSAGES, policy="block", max_new_tokens=1)
    assert (named.policy, named.policy_reason) == ("block", "")


def test_a_missing_block_is_encoded_even_below_the_break_even(tiny_cache):
    tiny_cache._break_even.pays = lambda *numbers: False
    answer = tiny_cache.generate("Who?", PASSAGES, max_new_tokens=1)
    assert (answer.num_hits, answer.num_misses) == (0, len(PASSAGES))
    assert all(tiny_cache.block(passage).block_id in tiny_cache.store for passage in PASSAGES)


def test_the_break_even_is_measured_at_load(tiny_cache):
    break_even = tiny_cache._break_even
    assert not break_even.pays(0)
    assert break_even._costs.forward_token >= 0
    assert break_even._costs.placing > 0


def test_a_look_must_pay_off_too(tiny_cache):
    break_even = tiny_cache._break_even
    break_even._costs = _Costs(forward=0.04, forward_token=0.001, placing=0.001, placing_token=0.0)
    assert break_even.pays(2)
    assert not break_even.pays(1)
    assert not break_even.pays(50, num_looked=10)
    assert break_even.pays(60, num_looked=10)


def test_what_is_computed_beside_placed_tokens_takes_longer_and_must_pay_off_too(tiny_cache):
    break_even = tiny_cache._break_even
    break_even._costs = _Costs(forward=0.04, forward_token=0.001, placing=0.001, placing_token=0.0)
    assert break_even.pays(60, 300)
    assert not break_even.pays(60, 500)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("block", lambda total, asked: (0, 0)),
        ("link-4", lambda total, asked: (0, 0)),
        ("link-4+query-0.25", lambda total, asked: (round(0.25 * total), asked)),
        ("blend-0.5", lambda total, asked: (round(0.5 * total), "layers")),
        ("query-1.0", lambda total, asked: (total, asked)),
    ],
)
def test_what_a_look_takes_is_known_before(tiny_cache, policy, expected):
    plan = tiny_cache._planner.plan(Question("Who?", PASSAGES), policy=policy, max_new_tokens=1, start=0.0)
    asked = len(plan.unfilled().positions)
    num_chosen, num_looked = expected_work(tiny_cache.model, plan)
    wanted, looked = expected(plan.num_passage_tokens, asked)
    assert num_chosen == wanted
    assert num_looked == (plan.num_tokens * 2 // 3 if looked == "layers" else looked)
    tiny_cache._prefill([plan])
    assert len(plan.chosen) == num_chosen
