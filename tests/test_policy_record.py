"""What ``auto`` stands for in a directory: by default, calibrated, and after the guard gave policies up."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from rag_blockcache import BlockCache
from rag_blockcache.auto_policy import AutoPolicy
from rag_blockcache.errors import StoreError
from rag_blockcache.policy_record import (
    FILE_NAME,
    Calibration,
    PolicyRecord,
    WatchedPolicy,
    read_records,
    reset_guard,
)
from rag_blockcache.reuse import BLOCK, FULL, LADDER, choose_policy, parse_policy

DEFAULT = (BLOCK, "by default")
CALIBRATED = Calibration("link-9", ("link-33",), 40, 0.964, 0.951, 0.05)


def open_auto(directory, *, fingerprint="f", prompt="p", default=DEFAULT):
    return AutoPolicy(directory, default=default, model="m", fingerprint=fingerprint, prompt=prompt)


def given_up(*names):
    watched = tuple(WatchedPolicy(name, 31, 310, 62.0, 248, 1000.0, 0.1, True) for name in names)
    return lambda record: dataclasses.replace(record, watched=watched)


def calibrated(record):
    return dataclasses.replace(record, calibration=CALIBRATED)


def name_of(auto):
    return auto.current[0].name


def test_without_a_record_the_default_holds(tmp_path):
    assert open_auto(tmp_path).current == DEFAULT
    assert not list(tmp_path.iterdir()), "looking makes no file"


@pytest.mark.parametrize("is_block_fine_tuned", [True, False])
def test_the_default_stands_on_the_ladder_which_ends_with_full(is_block_fine_tuned):
    assert choose_policy(is_block_fine_tuned)[0].name in LADDER
    assert LADDER[-1] == FULL.name
    assert all(parse_policy(name) is not None for name in LADDER)


def test_each_policy_that_is_given_up_is_a_step_up_the_ladder(tmp_path):
    for number in range(1, len(LADDER)):
        auto = open_auto(tmp_path)
        auto.update(given_up(*LADDER[:number]))
        assert name_of(auto) == LADDER[number]
        assert auto.current[1] == (
            f"the guard gave up {LADDER[number - 1]}: 0.200 nats a token from full attention "
            "over 31 answers, 0.1 are allowed"
        )


def test_a_policy_that_the_model_cannot_use_is_stepped_over():
    auto = AutoPolicy(
        None,
        default=DEFAULT,
        model="m",
        fingerprint="f",
        prompt="p",
        can_use=lambda policy: policy.name not in LADDER[1:3],
    )
    assert auto.current == DEFAULT
    auto.update(given_up("block"))
    assert name_of(auto) == LADDER[3]
    assert auto.current[1].startswith("the guard gave up block: ")


def test_a_policy_that_is_given_up_below_the_one_in_use_changes_nothing(tmp_path):
    default = (parse_policy(LADDER[1]), "why")
    auto = open_auto(tmp_path, default=default)
    auto.update(given_up(LADDER[0], "link-7"))
    assert auto.current == default


def test_a_calibrated_policy_is_used_with_its_reason(tmp_path):
    auto = open_auto(tmp_path)
    auto.update(calibrated)
    assert name_of(auto) == "link-9"
    assert auto.current[1].startswith("calibrated on 40 questions: fidelity 0.964, at least 0.951")
    auto.update(given_up("link-9"))
    assert name_of(auto) == "link-33", "steps go along what was measured, not along the ladder"
    auto.update(given_up("link-9", "link-33"))
    assert name_of(auto) == "full"


@pytest.mark.parametrize("change", [calibrated, given_up("block")])
def test_a_record_outlives_the_process_that_wrote_it(change, tmp_path):
    open_auto(tmp_path).update(change)
    again = open_auto(tmp_path)
    assert again.current == open_auto(tmp_path).current
    assert again.current != DEFAULT


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"prompt": "q"}])
def test_a_record_of_another_model_or_prompt_does_not_count(other, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    open_auto(tmp_path).update(calibrated)
    stranger = open_auto(tmp_path, **other)
    assert stranger.current == DEFAULT
    assert "is of another model or prompt" in caplog.text
    stranger.update(given_up("block"))
    assert name_of(open_auto(tmp_path)) == "link-9", "both are kept"
    assert name_of(open_auto(tmp_path, **other)) == LADDER[1]


def test_a_record_says_for_people_what_auto_uses(tmp_path):
    auto = open_auto(tmp_path)
    auto.update(calibrated)
    [record] = read_records(tmp_path)
    assert (record.policy, record.reason) == ("link-9", CALIBRATED.reason)
    auto.update(given_up("link-9"))
    [record] = read_records(tmp_path)
    assert record.policy == "link-33"


def test_resetting_the_guard_keeps_the_calibration(tmp_path):
    auto = open_auto(tmp_path)
    auto.update(calibrated)
    auto.update(given_up("link-9"))
    assert reset_guard(tmp_path) == ["link-9"]
    assert name_of(open_auto(tmp_path)) == "link-9"
    [record] = read_records(tmp_path)
    assert (record.watched, record.policy, record.reason) == ((), "link-9", CALIBRATED.reason)


def test_resetting_where_nothing_is_on_record_makes_no_file(tmp_path):
    assert reset_guard(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_threads_lose_nothing_of_a_record_that_is_in_memory():
    auto = open_auto(None)

    def slowly(record):
        time.sleep(0.001)  # another thread would find the same record
        return record.with_seen(_one_more(record))

    threads = [threading.Thread(target=lambda: [auto.update(slowly) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert auto.record.seen("block").num_answers == 20


def test_a_request_is_planned_by_one_choice_whatever_changes_meanwhile():
    class Changing(AutoPolicy):
        """Forgets its choice as soon as it was read, as another thread may have it do."""

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if name == "_choice" and found is not None:
                self._choice = None
            return found

    auto = Changing(None, default=DEFAULT, model="m", fingerprint="f", prompt="p")
    auto.update(calibrated)
    plan = SimpleNamespace(is_auto=True, policy=BLOCK, policy_reason="", blocks={})
    auto.apply(plan)
    assert plan.policy.name == calibrated(auto.record).calibration.policy


def test_without_a_directory_the_record_is_in_memory():
    auto = open_auto(None)
    auto.update(calibrated)
    assert name_of(auto) == "link-9"


RECORD = dataclasses.asdict(PolicyRecord("m", "f", "p", CALIBRATED, (WatchedPolicy("block"),)))
DAMAGED = {
    "half of it": '{"format": "rag_blockcache policies", "ver',
    "a list": "[]",
    "another format": json.dumps({"format": "blocks", "version": 1, "records": []}),
    "a later version": json.dumps({"format": "rag_blockcache policies", "version": 2, "records": []}),
    "a field too much": {**RECORD, "more": 1},
    "no calibration": {key: value for key, value in RECORD.items() if key != "calibration"},
    "a policy that is a number": {**RECORD, "calibration": {**RECORD["calibration"], "policy": 3}},
    "a fidelity that is a text": {**RECORD, "calibration": {**RECORD["calibration"], "fidelity": "high"}},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_cannot_be_used_is_told_and_kept(what, tmp_path, caplog):
    content = DAMAGED[what]
    if isinstance(content, dict):
        content = json.dumps({"format": "rag_blockcache policies", "version": 1, "records": [content]})
    (tmp_path / FILE_NAME).write_text(content)
    auto = open_auto(tmp_path)
    assert auto.current == DEFAULT
    assert f"{FILE_NAME} " in caplog.text
    with pytest.raises(StoreError, match="delete"):
        auto.update(calibrated)
    assert name_of(auto) == "link-9", "it holds in this process"
    assert (tmp_path / FILE_NAME).read_text() == content


def test_a_change_that_cannot_be_written_is_made_once_in_this_process(tmp_path):
    auto = open_auto(tmp_path / "gone")
    with pytest.raises(StoreError, match="gone"):
        auto.update(lambda record: record.with_seen(_one_more(record)))
    assert auto.record.seen("block").num_answers == 1


def test_a_full_disk_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    auto = open_auto(tmp_path)
    auto.update(calibrated)
    before = (tmp_path / FILE_NAME).read_text()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        auto.update(given_up("link-9"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(FILE_NAME, before)]


def test_a_policy_of_another_release_leaves_the_default(tmp_path, caplog):
    auto = open_auto(tmp_path)
    unknown = dataclasses.replace(CALIBRATED, policy="mend-3")
    auto.update(lambda record: dataclasses.replace(record, calibration=unknown))
    assert open_auto(tmp_path).current == DEFAULT
    assert "'mend-3' is unknown" in caplog.text


def _one_more(record):
    seen = record.seen("block")
    return dataclasses.replace(seen, num_answers=seen.num_answers + 1)


COUNT = """
import dataclasses, sys
from rag_blockcache.auto_policy import AutoPolicy
from rag_blockcache.reuse import BLOCK

def one_more(record):
    seen = record.seen("block")
    return record.with_seen(dataclasses.replace(seen, num_answers=seen.num_answers + 1))

auto = AutoPolicy(sys.argv[1], default=(BLOCK, ""), model="m", fingerprint="f", prompt="p")
for _ in range(30):
    auto.update(one_more)
"""


def test_threads_and_processes_lose_none_of_what_they_add(tmp_path):
    def count():
        auto = open_auto(tmp_path)
        for _ in range(30):
            auto.update(lambda record: record.with_seen(_one_more(record)))

    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(2)]
    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    [record] = read_records(tmp_path)
    assert record.seen("block").num_answers == 120
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.fixture
def cheap(monkeypatch):
    """Makes reuse pay from the first token on, so that ``auto`` does not depend on this machine."""
    from rag_blockcache.break_even import BreakEven

    monkeypatch.setattr(BreakEven, "pays", lambda *numbers: True)


def test_auto_answers_under_the_policy_on_record(tiny_model, tiny_tokenizer, tmp_path, cheap):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer) as cache:
        before = cache.generate("Who?", ["Ada wrote the note."], max_new_tokens=2)
        cache.auto_policy.update(calibrated)
        calibrated_answer = cache.generate("Who?", ["Ada wrote the note."], max_new_tokens=2)
        named = cache.generate("Who?", ["Ada wrote the note."], policy="block", max_new_tokens=2)
    assert before.policy == choose_policy(False)[0].name
    assert (calibrated_answer.policy, calibrated_answer.policy_reason) == ("link-9", CALIBRATED.reason)
    assert (named.policy, named.policy_reason) == ("block", "")
    options = {"tokenizer": tiny_tokenizer}
    with BlockCache(tiny_model, tmp_path, **options) as cache:
        assert cache.generate("Who?", ["Ada wrote the note."], max_new_tokens=2).policy == "link-9"
    for other in ({"preamble": "Read."}, {"passage_format": "plain"}, {"blocks_see": "preamble"}):
        with BlockCache(tiny_model, tmp_path, **options, **other) as cache:
            answer = cache.generate("Who?", ["Ada wrote the note."], max_new_tokens=2)
            assert answer.policy == before.policy


def test_where_auto_came_down_to_full_no_block_is_looked_up(tiny_cache, cheap):
    tiny_cache.auto_policy.update(given_up(*LADDER[:-1]))
    answer = tiny_cache.generate("Who?", ["Ada wrote the note."], max_new_tokens=2)
    assert (answer.policy, answer.num_hits, answer.num_misses) == ("full", 0, 0)
    assert answer.policy_reason.startswith(f"the guard gave up {LADDER[-2]}")
    full = tiny_cache.generate("Who?", ["Ada wrote the note."], policy="full", max_new_tokens=2)
    assert answer.token_ids == full.token_ids
