"""The guard: what it measures, when it gives a policy up, and that nobody has to wait for it."""

from __future__ import annotations

import dataclasses
import logging
import random
import subprocess
import sys
import threading
import time

import architectures
import pytest
import torch
from test_block_cache import Slow
from transformers import LogitsProcessorList

from rag_blockcache import BlockCache, Chat, Question, Text, guard, guard_comparison
from rag_blockcache.auto_policy import AutoPolicy
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.guard import Guard
from rag_blockcache.guard_comparison import Comparison
from rag_blockcache.guard_rule import weighed
from rag_blockcache.policy_record import FILE_NAME, WatchedPolicy
from rag_blockcache.reuse import BLOCK, LADDER

MILL = "The mill at Aldbury was built in 1787 by Ruth Hale, and burned down twice."
FERRY = "The ferry at Coldwater carries nine carts and runs twice a day, but not on Sundays."
ASKED = Question("Who built the mill?", [MILL, FERRY])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}


@pytest.fixture
def cheap(monkeypatch):
    """Makes reuse pay from the first token on, so that ``auto`` does not depend on this machine."""
    from rag_blockcache.break_even import BreakEven

    monkeypatch.setattr(BreakEven, "pays", lambda *numbers: True)


@pytest.fixture
def guarded(tiny_model, tiny_tokenizer, tmp_path):
    """Opens caches over one directory that compare every answer."""
    opened = []

    def open_cache(**options):
        options = {"guard_rate": 1.0, "guard_threshold": 1e9, "blocks_see": "themselves", **options}
        opened.append(BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, **options))
        return opened[-1]

    yield open_cache
    for cache in opened:
        cache.close()


def settled(cache, num_answers):
    """Wait until so many answers were compared, dropped, or failed; return the status."""
    deadline = time.perf_counter() + 20
    while time.perf_counter() < deadline:
        status = cache.guard
        if status.num_compared + status.num_dropped + status.num_failed >= num_answers:
            return status
        time.sleep(0.01)
    raise AssertionError(f"{cache.guard} after 20 seconds")


def guard_threads():
    return [each for each in threading.enumerate() if each.name == "rag-blockcache-guard"]


def finish():
    """Wait until guards have nothing left to do."""
    for thread in guard_threads():
        thread.join(timeout=20)
    assert not guard_threads()


# What is measured


@torch.inference_mode()
def log_probabilities(network, segments, answer, *, is_block):
    """Return what one forward pass over prompt and answer gives at each token of the answer."""
    segments = [*segments[:-1], [*segments[-1], *answer[:-1]]]
    lengths = [len(segment) for segment in segments]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = place[:, None] >= place
    if is_block:
        seen = seen & ((owner[:, None] == owner) | (owner == len(lengths) - 1)[:, None])
    ids = torch.tensor([token for segment in segments for token in segment])
    output = network(input_ids=ids[None], attention_mask=seen[None, None], use_cache=False)
    return output.logits[0, -len(answer) :].double().log_softmax(dim=-1)


def expected(cache, request, token_ids):
    segments = cache.segments(request)
    full, block = (
        log_probabilities(cache.model.network, segments, token_ids, is_block=is_block)
        for is_block in (False, True)
    )
    same = int((full.argmax(-1) == block.argmax(-1)).sum())
    return float((full.exp() * (full - block)).sum()), same


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 100])
@pytest.mark.parametrize("repeats", [1, 5])
def test_divergence_and_agreement_are_those_of_plain_forward_passes(num_tokens, repeats, guarded):
    cache = guarded()
    request = Question("Who built the mill?", [MILL * repeats, FERRY * repeats])  # in one pass, or in several
    answer = cache.answer(request, policy="block", **GREEDY | {"max_new_tokens": num_tokens})
    [seen] = settled(cache, 1).watched
    compared = answer.token_ids[:64]
    divergence, num_same = expected(cache, request, compared)
    assert (seen.name, seen.num_answers, seen.num_tokens) == ("block", 1, len(compared))
    assert seen.divergence_sum == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert seen.divergence_sum > 1e-3
    assert seen.num_same == num_same
    assert seen.divergence == pytest.approx(divergence / len(compared), rel=1e-3, abs=1e-5)
    assert seen.agreement == num_same / len(compared)


def test_a_drawn_answer_is_compared_along_what_was_drawn(guarded):
    cache = guarded()
    torch.manual_seed(3)
    drawn = cache.answer(ASKED, policy="block", max_new_tokens=12, do_sample=True, temperature=5.0)
    [seen] = settled(cache, 1).watched
    assert seen.divergence_sum == pytest.approx(expected(cache, ASKED, drawn.token_ids)[0], rel=1e-3)
    greedy = cache.answer(ASKED, policy="block", **GREEDY)
    assert drawn.token_ids[:8] != greedy.token_ids, "there was something to draw"


def test_policies_are_told_apart_and_sums_run_on(guarded):
    cache = guarded()
    for number, policy in enumerate(("block", "link-16", "link-16"), start=1):
        cache.answer(ASKED, policy=policy, **GREEDY)
        settled(cache, number)
    block, link = cache.guard.watched
    assert (block.num_answers, link.num_answers, link.num_tokens) == (1, 2, 16)
    assert link.divergence < block.divergence


@pytest.mark.parametrize("policy", ["link-4", "query-0.2", "link-4+blend-0.3"])
def test_a_policy_chooses_for_the_comparison_what_it_chose_for_the_answer(policy, guarded, monkeypatch):
    cache = guarded()
    plans = []
    inner = BlockCache._prefill

    def observed(self, given, **options):
        result = inner(self, given, **options)
        plans.extend(given)
        return result

    monkeypatch.setattr(BlockCache, "_prefill", observed)
    cache.answer(ASKED, policy=policy, **GREEDY)
    settled(cache, 1)
    served, compared = plans
    assert served is not compared
    assert served.is_computed().equal(compared.is_computed())
    assert compared.policy.name == policy


# Which answers are compared


REQUESTS = {
    "question": ASKED,
    "chat": Chat([{"role": "user", "content": f"{MILL}\n\nWho built it?"}], hints=[MILL]),
    "text": Text(f"Facts:\n{MILL}\nWho built it?", hints=[MILL]),
}


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("admission", ["always", "frequency", "off"])
def test_every_kind_of_request_is_compared(kind, admission, guarded):
    cache = guarded(admission=admission)
    answer = cache.answer(REQUESTS[kind], policy="block", **GREEDY)
    [seen] = settled(cache, 1).watched
    divergence, num_same = expected(cache, REQUESTS[kind], answer.token_ids)
    assert seen.divergence_sum == pytest.approx(divergence, rel=1e-3)
    assert seen.num_same == num_same


def test_every_answer_of_a_batch_is_compared(guarded):
    cache = guarded()
    requests = list(REQUESTS.values())
    answers = cache.answer_batch(requests, policy="block", **GREEDY)
    [seen] = settled(cache, 3).watched
    sums = [
        expected(cache, *pair)[0]
        for pair in zip(requests, (answer.token_ids for answer in answers), strict=True)
    ]
    assert seen.divergence_sum == pytest.approx(sum(sums), rel=1e-3)


def test_the_next_turn_of_a_chat_is_compared_as_if_nothing_had_been_kept_of_the_last(guarded):
    cache = guarded()
    first = REQUESTS["chat"]
    said = cache.answer(first, policy="block", **GREEDY)
    turns = [*first.messages, {"role": "assistant", "content": said.text}]
    second = Chat([*turns, {"role": "user", "content": "And when was that?"}], hints=[MILL])
    plans = []
    inner = cache._kept.take

    def observed(plan, room):
        plans.append(plan)
        return inner(plan, room)

    cache._kept.take = observed
    answer = cache.answer(second, policy="block", **GREEDY)
    assert plans[0].num_kept > 0, "it went on from the context of the first"
    settled(cache, 2)
    [seen] = cache.guard.watched
    sums = [expected(cache, first, said.token_ids), expected(cache, second, answer.token_ids)]
    assert seen.divergence_sum == pytest.approx(sum(each for each, _ in sums), rel=1e-3)


def test_a_comparison_stores_no_block_that_the_answer_did_not_store(guarded):
    cache = guarded(memory_budget_bytes=0)
    with cache._guard.answering():  # nothing is compared before we have looked
        cache.answer(REQUESTS["chat"], policy="block", **GREEDY)
        before = set(cache.store.disk)
    settled(cache, 1)
    assert set(cache.store.disk) == before
    assert len(before) == 1, "of the text before the passage, which is this chat's alone, none is stored"


def test_a_stream_is_compared_when_it_was_read(guarded):
    cache = guarded()
    list(cache.stream_answer(ASKED, policy="block", **GREEDY))
    assert settled(cache, 1).num_compared == 1


async def test_an_awaited_answer_is_compared(guarded):
    cache = guarded()
    await cache.aanswer(ASKED, policy="block", **GREEDY)
    assert settled(cache, 1).num_compared == 1


def test_a_stream_that_was_closed_is_not_compared(guarded):
    cache = guarded()
    slow = LogitsProcessorList([Slow(0.01)])
    options = {**GREEDY, "max_new_tokens": 400, "logits_processor": slow}
    with cache.stream_answer(ASKED, policy="block", **options) as stream:
        next(stream)
    assert stream.answer.finish_reason == "cancelled"
    cache.answer(ASKED, policy="block", **GREEDY)
    finish()
    assert cache.guard.num_compared == 1


@pytest.mark.parametrize(
    ("request_", "policy"), [(ASKED, "full"), (Question("Who?"), "block"), (Text("Who?"), "block")]
)
def test_where_no_passage_is_reused_there_is_nothing_to_compare(request_, policy, guarded):
    cache = guarded()
    cache.answer(request_, policy=policy, **GREEDY)
    finish()
    assert cache.guard.watched == ()


def test_where_auto_found_computing_sooner_there_is_nothing_to_compare(guarded, monkeypatch):
    cache = guarded()
    cache.answer(ASKED, policy="block", **GREEDY)  # from here on all blocks are there
    monkeypatch.setattr(cache._break_even, "pays", lambda *numbers: False)
    assert cache.answer(ASKED, **GREEDY).policy == "full"
    finish()
    assert [seen.name for seen in cache.guard.watched] == ["block"]


@pytest.mark.parametrize(("num_repeats", "is_compared"), [(1, True), (11, False), (25, True)])
def test_under_angles_that_change_with_the_length_an_answer_is_compared_if_it_keeps_to_one_set(
    num_repeats, is_compared, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(guard_comparison, "_CHUNK", 32)
    network = architectures.accepted("phi3-longrope")  # turns by other angles beyond 128 tokens
    options = {
        "tokenizer": tiny_tokenizer,
        "preamble": "",
        "passage_format": "plain",
        "blocks_see": "themselves",
    }
    request = Question("Where? " * num_repeats, ["Ada."])
    with BlockCache(network, None, guard_rate=1.0, guard_threshold=1e9, **options) as cache:
        length = sum(map(len, cache.segments(request)))
        assert (length < 128 < length + 24) != is_compared
        answer = cache.answer(request, policy="block", max_new_tokens=24, eos_token_id=[])
        finish()
        assert cache.guard.num_compared == is_compared
        if is_compared:
            [seen] = cache.guard.watched
            divergence, num_same = expected(cache, request, answer.token_ids)
            assert seen.divergence_sum == pytest.approx(divergence, rel=1e-3, abs=1e-5)
            assert seen.num_same == num_same


def chosen(plan, model, seed, rate=0.3, number=100):
    """Return which of many answers a guard chooses; nothing is compared meanwhile."""
    auto = AutoPolicy(None, default=(BLOCK, ""), model="", fingerprint="", prompt="")
    watching = Guard(model, auto, rate=rate, threshold=0.1, seed=seed)
    found = []
    with watching.answering():
        for index in range(number):
            before = watching.status()
            watching.sample(plan, [5, 6, 7], "stop", None)
            after = watching.status()
            if after.num_waiting + after.num_dropped > before.num_waiting + before.num_dropped:
                found.append(index)
    watching.close()
    return found


def test_the_choice_is_the_share_that_was_asked_for_and_repeats_under_a_seed(tiny_cache, monkeypatch):
    monkeypatch.setattr(guard, "_MAX_WAITING", 1000)
    monkeypatch.setattr(Guard, "_start", lambda self: None)  # nothing is taken out of the queue
    plan = tiny_cache._planner.plan(ASKED, policy="block", max_new_tokens=8, start=0.0)
    first = chosen(plan, tiny_cache.model, seed=1)
    assert 15 < len(first) < 45
    assert chosen(plan, tiny_cache.model, seed=1) == first
    assert chosen(plan, tiny_cache.model, seed=2) != first
    assert len(chosen(plan, tiny_cache.model, seed=1, rate=1.0)) == 100


# Nobody waits for it


def test_off_it_is_not_there(tiny_cache, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing of a guard is made")

    monkeypatch.setattr(Guard, "__init__", fail)
    monkeypatch.setattr(Guard, "sample", fail)
    monkeypatch.setattr(Comparison, "__init__", fail)
    before = threading.active_count()
    for _ in range(3):
        tiny_cache.answer(ASKED, policy="block", **GREEDY)
    assert threading.active_count() == before
    status = tiny_cache.guard
    assert (status.rate, status.watched, status.num_compared) == (0.0, (), 0)
    assert not (tiny_cache.store.disk.directory.parent / FILE_NAME).exists()


def test_the_thread_is_there_only_while_there_is_something_to_compare(guarded):
    cache = guarded()
    assert guard_threads() == []
    cache.answer(ASKED, policy="block", **GREEDY)
    settled(cache, 1)
    finish()


def test_it_gives_way_while_a_request_is_answered(guarded, monkeypatch):
    cache = guarded()
    passes = []
    inner = Comparison._pass

    def observed(self, *arguments, **options):
        result = inner(self, *arguments, **options)
        passes.append(time.perf_counter())
        return result

    monkeypatch.setattr(Comparison, "_pass", observed)
    long = Question("Who built the mill?", [MILL * 6, FERRY * 6])
    slow = LogitsProcessorList([Slow(0.02)])
    options = {**GREEDY, "max_new_tokens": 50, "logits_processor": slow}
    stream = cache.stream_answer(ASKED, policy="block", **options)
    next(stream)  # it is being answered from here on
    cache.answer(long, policy="block", **GREEDY)
    for _ in stream:
        pass
    end = time.perf_counter()
    settled(cache, 2)
    assert len(passes) >= 4
    assert min(passes) > end - 0.02, "not one pass before the last token"


def test_it_goes_on_with_the_next_pass_after_a_request_came_between(guarded, monkeypatch):
    cache = guarded()
    is_inside, may_go_on = threading.Event(), threading.Event()
    inner, sizes = Comparison._pass, []

    def halting(self, context, token_ids, start, stop, **options):
        result = inner(self, context, token_ids, start, stop, **options)
        sizes.append(stop - start)
        if start == 0:
            is_inside.set()
            assert may_go_on.wait(20)
        return result

    monkeypatch.setattr(Comparison, "_pass", halting)
    long = Question("Who built the mill?", [MILL * 6, FERRY * 6])
    first = cache.answer(long, policy="block", **GREEDY)
    assert is_inside.wait(20)
    between = cache.answer(ASKED, policy="block", **GREEDY)  # does not wait for the rest
    may_go_on.set()
    [seen] = settled(cache, 2).watched
    sums = expected(cache, long, first.token_ids)[0] + expected(cache, ASKED, between.token_ids)[0]
    assert seen.divergence_sum == pytest.approx(sums, rel=1e-3)
    assert max(sizes) == 256


def test_what_does_not_fit_the_queue_is_dropped_and_counted(guarded):
    cache = guarded()
    with cache._guard.answering():  # as if a long request were under way
        for _ in range(12):
            cache.answer(ASKED, policy="block", **GREEDY)
        busy = cache.guard
    assert busy.num_compared == 0
    assert busy.num_waiting == 8
    status = settled(cache, 12)
    assert status.num_dropped + status.num_compared == 12
    assert status.num_compared in (8, 9), "eight were waiting, and one was in hand"


def test_closing_does_not_wait_for_what_has_not_begun(guarded):
    cache = guarded()
    with cache._guard.answering():
        for _ in range(3):
            cache.answer(ASKED, policy="block", **GREEDY)
        assert guard_threads()
        cache.close()
        assert not guard_threads()
    assert cache.guard.num_compared == 0


def test_an_error_in_the_background_is_logged_and_never_raised(guarded, monkeypatch, caplog):
    cache = guarded()
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_full", lambda *_: 1 / 0)
        answer = cache.answer(ASKED, policy="block", **GREEDY)
        status = settled(cache, 1)
    assert len(answer.token_ids) == 8
    assert (status.num_failed, status.num_compared) == (1, 0)
    assert "ZeroDivisionError" in caplog.text
    cache.answer(ASKED, policy="block", **GREEDY)
    assert settled(cache, 2).num_compared == 1


def test_an_error_that_comes_again_does_not_fill_the_log(guarded, monkeypatch, caplog):
    cache = guarded()
    monkeypatch.setattr(Comparison, "_full", lambda *_: 1 / 0)
    for number in range(1, 4):
        cache.answer(ASKED, policy="block", **GREEDY)
        assert settled(cache, number).num_failed == number
    assert caplog.text.count("ZeroDivisionError: division by zero") == 1
    monkeypatch.setattr(Comparison, "_full", lambda *_: [][0])
    cache.answer(ASKED, policy="block", **GREEDY)
    settled(cache, 4)
    assert caplog.text.count("IndexError") == 1, "another one is told"


def test_a_divergence_that_is_no_number_is_a_failure(guarded, monkeypatch, caplog):
    cache = guarded()
    monkeypatch.setattr(Comparison, "compare", lambda *_: (float("nan"), 0))
    cache.answer(ASKED, policy="block", **GREEDY)
    status = settled(cache, 1)
    assert (status.num_failed, status.watched) == (1, ())
    assert "its divergence is nan" in caplog.text


def test_where_no_thread_can_be_started_answers_go_on(guarded, monkeypatch, caplog):
    cache = guarded()

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        cache.answer(ASKED, policy="block", **GREEDY)
    assert (cache.guard.num_dropped, cache.guard.num_waiting) == (1, 0)
    assert "can't start new thread" in caplog.text
    cache.answer(ASKED, policy="block", **GREEDY)
    assert settled(cache, 2).num_compared == 1


def test_what_cannot_be_recorded_holds_in_this_process(guarded, tmp_path, caplog):
    cache = guarded()
    (tmp_path / FILE_NAME).write_text("[]")
    for number in range(1, 4):
        cache.answer(ASKED, policy="block", **GREEDY)
        status = settled(cache, number)
    assert (status.num_compared, status.watched[0].num_answers) == (3, 3)
    assert caplog.text.count("holds until this program ends: StoreError: ") == 1


PROGRAM = """
import sys
sys.path[:0] = {path!r}
import architectures
from conftest import byte_tokenizer
from rag_blockcache import BlockCache, Question

model = architectures.build("Llama", {{"max_position_embeddings": 2048}})
cache = BlockCache(model, None, tokenizer=byte_tokenizer(), guard_rate=1.0)
passages = ["The mill was built in 1787 by Ruth Hale. " * 14, "The ferry carries nine carts. " * 14]
for _ in range(6):
    cache.answer(Question("Who?", passages), policy="block", max_new_tokens=2)
print("done")
"""


def test_a_program_that_never_closes_ends_at_once():
    program = PROGRAM.format(path=[path for path in sys.path if path.endswith("tests")])
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "options",
    [
        {"guard_rate": -0.1},
        {"guard_rate": 1.5},
        {"guard_rate": float("nan")},
        {"guard_threshold": 0.0},
        {"guard_threshold": float("inf")},
    ],
)
def test_a_rate_or_a_threshold_out_of_bounds_is_an_error(options, guarded, tmp_path):
    [(name, value)] = options.items()
    with pytest.raises(InvalidInputError, match=f"{name} is {value}"):
        guarded(**options)
    assert not list(tmp_path.iterdir())


# When a policy is given up


def answers_until_given_up(excesses, threshold=0.1):
    """Return after how many answers a policy is given up, by their excess over the threshold; or None."""
    seen = WatchedPolicy("block")
    for number, excess in enumerate(excesses, start=1):
        seen = weighed(seen, 20, 20 * threshold * excess, 15, threshold=threshold)
        assert seen.num_answers == number
        if seen.is_given_up:
            return number
    return None


def test_answers_within_the_threshold_never_give_a_policy_up():
    assert answers_until_given_up([1.0] * 5000) is None
    assert answers_until_given_up([0.0, 1.9] * 2000) is None


def test_answers_beyond_the_threshold_give_a_policy_up_the_sooner_the_farther():
    numbers = [answers_until_given_up([excess] * 5000) for excess in (1.2, 2.0, 4.0, 10.0)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[1] == 31
    assert all(numbers)


def test_fewer_than_five_answers_are_never_enough():
    assert answers_until_given_up([1e9] * 4) is None
    assert answers_until_given_up([1e9] * 5) == 5
    assert answers_until_given_up([0.2] * 20 + [1e9] + [0.2] * 20) is None


def test_a_long_good_time_does_not_hide_what_comes_after_it():
    assert answers_until_given_up([0.1] * 1000 + [2.0] * 40) == 1000 + 31


def test_at_the_threshold_a_false_alarm_takes_more_than_a_thousand_answers_on_average():
    generator = random.Random(7)
    numbers = [
        answers_until_given_up(generator.expovariate(1.0) for _ in range(5000)) or 5000 for _ in range(30)
    ]
    assert sum(numbers) / len(numbers) > 1000


def test_at_twice_the_threshold_dozens_of_spread_answers_are_enough():
    generator = random.Random(7)
    numbers = [answers_until_given_up(2 * generator.expovariate(1.0) for _ in range(5000)) for _ in range(50)]
    assert 20 < sorted(numbers)[25] < 90


def test_evidence_counts_for_the_threshold_it_was_found_by():
    seen = WatchedPolicy("block")
    for _ in range(30):
        seen = weighed(seen, 10, 2.0, 5, threshold=0.1)
    assert not seen.is_given_up
    other = weighed(seen, 10, 2.0, 5, threshold=0.11)
    assert not other.is_given_up
    assert other.evidence < 2
    assert weighed(seen, 10, 2.0, 5, threshold=0.1).is_given_up
    assert (other.num_answers, other.divergence_sum) == (31, pytest.approx(62.0))


def test_a_policy_that_was_given_up_stays_so():
    seen = dataclasses.replace(WatchedPolicy("block"), is_given_up=True, threshold=0.1, evidence=1000.0)
    assert weighed(seen, 10, 0.0, 10, threshold=0.5).is_given_up


def test_past_the_threshold_auto_steps_up_says_so_once_and_remembers(guarded, cheap, caplog):
    caplog.set_level(logging.WARNING, "rag_blockcache.guard")
    cache = guarded(guard_threshold=1e-6)
    used = []
    for number in range(1, 20):
        answer = cache.answer(ASKED, **GREEDY)
        used.append(answer.policy)
        if answer.policy == "full":
            break
        settled(cache, number)
    ladder = LADDER[LADDER.index(used[0]) :]
    assert used == [name for name in ladder[:-1] for _ in range(5)] + ["full"]
    assert answer.policy_reason.startswith(f"the guard gave up {ladder[-2]}: ")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (len(ladder) - 1)
    assert f"policy {ladder[0]} is " in caplog.text
    assert f"auto uses {ladder[1]} from here on" in caplog.text
    assert (cache.guard.policy, cache.guard.reason) == ("full", answer.policy_reason)
    again = guarded(guard_rate=0.0)
    assert again.answer(ASKED, **GREEDY).policy_reason == answer.policy_reason
    assert again.guard.policy == "full"


def test_a_policy_that_was_named_is_used_whatever_the_guard_found(guarded, cheap, caplog):
    cache = guarded(guard_threshold=1e-6)
    for number in range(1, 8):
        assert cache.answer(ASKED, policy="block", **GREEDY).policy == "block"
        settled(cache, number)
    finish()
    [seen] = cache.guard.watched
    assert (seen.num_answers, seen.is_given_up) == (7, True)
    assert caplog.text.count("policy block is ") == 1
    assert cache.answer(ASKED, **GREEDY).policy == cache.guard.policy


def test_within_the_threshold_auto_stays_where_it_is(guarded, cheap):
    cache = guarded(guard_threshold=50.0)
    before = cache.guard.policy
    for number in range(1, 12):
        cache.answer(ASKED, **GREEDY)
        settled(cache, number)
    [seen] = cache.guard.watched
    assert (seen.num_answers, seen.is_given_up, cache.guard.policy) == (11, False, before)


def test_a_reset_begins_anew_here_and_in_the_directory(guarded, cheap):
    cache = guarded(guard_threshold=1e-6)
    before = cache.guard.policy
    for number in range(1, 6):
        cache.answer(ASKED, **GREEDY)
        settled(cache, number)
    assert cache.guard.policy != before
    cache.reset_guard()
    assert (cache.guard.policy, cache.guard.watched) == (before, ())
    assert guarded().guard.policy == before


def test_two_caches_of_a_directory_add_to_one_record(guarded, cheap):
    first, second = guarded(guard_threshold=1e-6), guarded(guard_threshold=1e-6)
    for number in range(1, 4):
        for cache in (first, second):
            cache.answer(ASKED, policy="block", **GREEDY)
            settled(cache, number)
    [seen] = second.guard.watched
    assert (seen.num_answers, seen.is_given_up) == (6, True)


@pytest.mark.real_weights
def test_on_a_real_model_more_repair_is_closer_to_full_attention(smollm2_path):
    passages = [
        "The mill at Aldbury was built in 1787 by Ruth Hale, a miller's widow from the next village.",
        "The ferry at Coldwater carries nine carts and runs twice a day, but never on Sundays.",
        "The bell of Saint Oda weighs four tonnes and hangs in the north tower of the old church.",
        "The weir below the mill was raised by two feet in 1834, after the great flood of that year.",
    ]
    questions = ["Who built the mill at Aldbury?", "How many carts does the ferry carry?"]
    with BlockCache(smollm2_path, None, guard_rate=1.0, guard_threshold=1e9) as cache:
        number = 0
        for policy in ("block", "link-16"):
            for question in questions:
                cache.generate(question, passages, policy=policy, max_new_tokens=16, do_sample=False)
                number += 1
                settled(cache, number)
        block, link = cache.guard.watched
    assert 0 < link.divergence < block.divergence < 3
    assert link.agreement > 0.5


def test_what_is_forgotten_while_it_waits_stays_forgotten(guarded, monkeypatch):
    cache = guarded()
    waiting, may_go_on = threading.Event(), threading.Event()
    give_way = cache._guard._comparison._give_way

    def wait():
        waiting.set()
        may_go_on.wait(20)
        give_way()

    monkeypatch.setattr(cache._guard._comparison, "_give_way", wait)
    cache.answer(ASKED, policy="block", **GREEDY)
    assert waiting.wait(20)
    cache.forget([MILL])
    may_go_on.set()
    assert settled(cache, 1).num_compared == 1
    assert cache.block(MILL).block_id not in cache.store
    assert cache.block(FERRY).block_id in cache.store
