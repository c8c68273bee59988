"""Arms are compared along full attention's answer, and the numbers are those of plain forward passes."""

from __future__ import annotations

import dataclasses

import pytest
import qa_data
import torch

from rag_blockcache.conditioning import STAND_INS
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.evaluation.answer_run import AnswerRun
from rag_blockcache.evaluation.arms import FULL_ARM, NO_PASSAGES, Arm, parse_arm, parse_arms
from rag_blockcache.evaluation.engines import Engines
from rag_blockcache.evaluation.predictions import PredictionLog
from rag_blockcache.evaluation.qa_examples import read_row
from rag_blockcache.evaluation.variants import in_order
from rag_blockcache.request import Question

ARMS = parse_arms("block,link-4,block/unmoved,block/conditioned")
TOKENS = 12


@pytest.fixture
def examples():
    return [read_row(row, dataset="village") for row in qa_data.rows()]


@pytest.fixture
def engines(tiny_model, tiny_tokenizer):
    with Engines(tiny_model, tokenizer=tiny_tokenizer, passage_format="plain") as engines:
        yield engines


def measure(engines, examples, arms=ARMS, *, batch_size=2, **options):
    """Run arms over examples, and return a function from arm and example to prediction."""
    log = PredictionLog(None, {})
    run = AnswerRun(engines, arms, log, max_new_tokens=TOKENS, **options)
    for start in range(0, len(examples), batch_size):
        run.measure(examples[start : start + batch_size])
    return lambda arm, example: log.get(example.key, arm)


@torch.inference_mode()
def log_probabilities(network, segments, answer, *, is_block, unmoved=False):
    """Return what one forward pass over prompt and answer gives at each token of the answer."""
    segments = [segments[0], *segments[1:-1], [*segments[-1], *answer[:-1]]]
    lengths = [len(segment) for segment in segments]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = place[:, None] >= place
    if is_block:
        seen = seen & ((owner[:, None] == owner) | (owner == len(lengths) - 1)[:, None])
    positions = place
    if unmoved:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        starts[-1] = 0  # the final block is where it is
        positions = place - starts[owner]
    ids = torch.tensor([token for segment in segments for token in segment])
    output = network(
        input_ids=ids[None], attention_mask=seen[None, None], position_ids=positions[None], use_cache=False
    )
    return output.logits[0, -len(answer) :].double().log_softmax(dim=-1)


WAYS = {
    "full": {"is_block": False},
    "no-passages": {"is_block": False},
    "block": {"is_block": True},
    "block/unmoved": {"is_block": True, "unmoved": True},
}


@pytest.mark.parametrize("name", WAYS)
def test_divergence_and_agreement_are_those_of_plain_forward_passes(engines, examples, name):
    found = measure(engines, examples)
    for example in examples:
        answer = found("full", example).token_ids
        segments = engines.plain.segments(example.question, example.passages)
        shown = () if name == "no-passages" else example.passages
        network = engines.plain.model.network
        full = log_probabilities(network, segments, answer, is_block=False)
        arm = log_probabilities(
            network, engines.plain.segments(example.question, shown), answer, **WAYS[name]
        )
        divergences = (full.exp() * (full - arm)).sum(dim=-1)
        prediction = found(name, example)
        assert prediction.num_answer_tokens == len(answer)
        assert prediction.divergence == pytest.approx(float(divergences.sum()), rel=1e-3, abs=1e-6)
        assert prediction.first_divergence == pytest.approx(float(divergences[0]), rel=1e-3, abs=1e-6)
        assert prediction.num_same_tokens == int((full.argmax(-1) == arm.argmax(-1)).sum())
        assert prediction.first_is_same == bool(full[0].argmax() == arm[0].argmax())
        log_likelihood = float(arm.gather(1, torch.tensor(answer)[:, None]).sum())
        assert prediction.answer_log_likelihood == pytest.approx(log_likelihood, rel=1e-5)


def test_one_block_conditioned_on_the_preamble_is_full_attention(engines, examples):
    one = [
        dataclasses.replace(each, passages=each.passages[:1], is_gold=each.is_gold[:1]) for each in examples
    ]
    found = measure(engines, one)
    for example in one:
        assert found("block/conditioned", example).divergence == pytest.approx(0.0, abs=1e-6)
        assert found("block", example).divergence > 1e-4


def test_the_arms_of_these_tests_differ_by_more_than_rounding(engines, examples):
    found = measure(engines, examples)
    for example in examples:
        divergences = [found(arm.name, example).divergence for arm in ARMS]
        assert divergences[0] == pytest.approx(0.0, abs=1e-9)
        assert min(divergences[1:]) > 1e-4
        assert len({round(each, 6) for each in divergences}) == len(ARMS)


def test_every_arm_answers_as_the_engine_does_when_asked_alone(engines, examples):
    found = measure(engines, examples)
    for example in examples:
        for arm in ARMS:
            shown = example.passages if arm.shows_passages else ()
            alone = engines.of(arm).generate(
                example.question, shown, policy=arm.policy, max_new_tokens=TOKENS, do_sample=False
            )
            assert found(arm.name, example).token_ids == tuple(alone.token_ids)
            assert found(arm.name, example).answer == alone.text


def test_the_size_of_a_batch_changes_nothing_but_rounding(engines, examples):
    alone, together = measure(engines, examples, batch_size=1), measure(engines, examples, batch_size=5)
    for example in examples:
        for arm in ARMS:
            one, other = alone(arm.name, example), together(arm.name, example)
            assert one.token_ids == other.token_ids
            assert one.divergence == pytest.approx(other.divergence, rel=1e-3, abs=1e-6)


def test_tokens_computed_again_are_counted_within_passages(engines, examples):
    found = measure(engines, examples)
    for example in examples:
        num_tokens = sum(len(engines.plain.block(passage).token_ids) for passage in example.passages)
        counted = {arm.name: found(arm.name, example).num_recomputed_tokens for arm in ARMS}
        assert counted == {
            "full": num_tokens,
            "no-passages": 0,
            "block": 0,
            "link-4": 4 * len(example.passages),
            "block/unmoved": 0,
            "block/conditioned": 0,
        }
        assert found("block", example).num_passage_tokens == num_tokens


def test_answers_are_judged_by_their_gold_answers(engines, examples):
    asked = examples[0]
    wrote = measure(engines, [asked])("block", asked).answer
    right = dataclasses.replace(asked, answers=("no", f"{wrote}"))
    wrong = dataclasses.replace(asked, answers=("something that no random model writes",))
    unknown = dataclasses.replace(asked, answers=())
    found = measure(engines, [right, wrong, unknown])
    assert (found("block", right).is_correct, found("block", right).is_exact) == (True, True)
    assert (found("block", wrong).is_correct, found("block", wrong).f1) == (False, 0.0)
    assert (found("block", unknown).is_correct, found("block", unknown).f1) == (None, None)


def test_gold_answers_are_scored_under_each_arm_on_demand(engines, examples):
    asked = examples[:1]
    assert measure(engines, asked)("block", asked[0]).gold_log_likelihood is None
    found = measure(engines, asked, scores_gold=True)
    tokens = engines.plain.prompt.text_tokens(asked[0].answers[0])
    segments = engines.plain.segments(asked[0].question, asked[0].passages)
    network = engines.plain.model.network
    expected = log_probabilities(network, segments, list(tokens), is_block=True)
    log_likelihood = float(expected.gather(1, torch.tensor(tokens)[:, None]).sum())
    assert found("block", asked[0]).gold_log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    assert found("block", asked[0]).num_gold_tokens == len(tokens)


def test_only_chosen_questions_are_timed(engines, examples):
    found = measure(engines, examples, timed={examples[3].key})
    for arm in ARMS:
        assert found(arm.name, examples[3]).ttft_seconds > 0
        assert found(arm.name, examples[0]).ttft_seconds is None


def test_blocks_are_forgotten_when_their_batch_is_done(engines, examples):
    measure(engines, examples)
    for arm in ARMS:
        cache = engines.of(arm)
        assert not any(cache.block(passage).block_id in cache.store for passage in examples[0].passages)


def test_an_answer_on_record_is_the_one_that_later_arms_are_compared_along(engines, examples):
    log = PredictionLog(None, {})
    AnswerRun(engines, [FULL_ARM, NO_PASSAGES], log, max_new_tokens=TOKENS).measure(examples)
    other = (5, 6, 7)  # another answer than full attention gives
    for example in examples:
        log.add([dataclasses.replace(log.get(example.key, "full"), token_ids=other)])
    run = AnswerRun(engines, ARMS, log, max_new_tokens=TOKENS)
    assert [arm.name for arm in run.missing(examples[0])] == [arm.name for arm in ARMS[2:]]
    run.measure(examples)
    for example in examples:
        assert log.get(example.key, "full").token_ids == other  # what is on record stays
        assert log.get(example.key, "block").num_answer_tokens == len(other)
        segments = engines.plain.segments(example.question, example.passages)
        full = log_probabilities(engines.plain.model.network, segments, other, is_block=False)
        arm = log_probabilities(engines.plain.model.network, segments, other, is_block=True)
        expected = float((full.exp() * (full - arm)).sum())
        assert log.get(example.key, "block").divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_is_on_record_is_not_written_again_when_it_shares_a_batch(engines, examples, tmp_path):
    log = PredictionLog(tmp_path, {})
    run = AnswerRun(engines, [FULL_ARM, NO_PASSAGES], log, max_new_tokens=TOKENS)
    run.measure(examples[:1])
    run.measure(examples[:3])
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("order", ["twice", "reversed"])
def test_an_unmoved_block_stays_at_its_positions_wherever_and_however_often_it_stands(
    engines, examples, order
):
    changed = [in_order(example, order) for example in examples[:2]]
    found = measure(engines, changed)
    network = engines.plain.model.network
    for example in changed:
        answer = found("full", example).token_ids
        segments = engines.plain.segments(example.question, example.passages)
        full = log_probabilities(network, segments, answer, is_block=False)
        arm = log_probabilities(network, segments, answer, is_block=True, unmoved=True)
        expected = float((full.exp() * (full - arm)).sum())
        assert found("block/unmoved", example).divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert found("block/unmoved", example).num_recomputed_tokens == 0
        assert found("block", example).divergence != pytest.approx(expected, rel=1e-2)


def test_a_block_that_saw_the_preamble_stays_behind_it_where_it_is_not_moved(engines, examples):
    one = [
        dataclasses.replace(each, passages=each.passages[:1], is_gold=each.is_gold[:1]) for each in examples
    ]
    found = measure(engines, one, parse_arms("block/unmoved/conditioned"))
    for example in one:  # which is where it stands
        assert found("block/unmoved/conditioned", example).divergence == pytest.approx(0.0, abs=1e-6)


def test_a_block_that_saw_stand_ins_stays_behind_as_many_tokens_where_it_is_not_moved(engines, examples):
    [arm] = parse_arms("block/unmoved/stand-ins")[2:]
    cache = engines.of(arm)
    example = examples[0]
    cache.prefill(example.passages)
    plan = cache._planner.plan(
        Question(example.question, example.passages), policy="block", max_new_tokens=1, start=0.0
    )
    stand_ins = cache.prompt.run_of_passages(STAND_INS)
    places = {cache._encoded_at(plan, index) for index in plan.blocks if index > 0}
    assert places == {len(stand_ins)}
    assert cache._encoded_at(plan, 0) == 0


def test_auto_is_measured_with_the_blocks_that_are_served(engines):
    of = {name: engines.of(parse_arm(name)).blocks_see for name in ("block", "block/stand-ins", "auto")}
    assert of == {"block": "themselves", "block/stand-ins": "stand-ins", "auto": "stand-ins"}


def test_arms_are_read_by_name():
    assert parse_arm("link-16/conditioned") == Arm(
        "link-16/conditioned", "link-16", options={"blocks_see": "preamble"}
    )
    assert parse_arm("block/unmoved").moves_keys is False
    assert [arm.name for arm in parse_arms("block, full")] == ["full", "no-passages", "block"]


@pytest.mark.parametrize("name", ["blocks", "block/upside-down", "block/", "/conditioned"])
def test_an_unknown_arm_is_an_error(name):
    with pytest.raises(InvalidInputError, match="unknown"):
        parse_arm(name)


def test_arms_share_an_engine_when_their_blocks_are_the_same():
    names = ["block", "link-16", "full", "block/unmoved", "block/conditioned", "link-4/conditioned"]
    engines = [parse_arm(name).engine for name in names]
    assert engines[0] == engines[1] == engines[2]
    assert engines[4] == engines[5]
    assert len(set(engines)) == 3


def test_answers_are_greedy_whatever_the_generation_configuration_says(engines, examples, monkeypatch):
    usual = measure(engines, examples)
    for name, value in {"do_sample": True, "repetition_penalty": 1.8, "num_beams": 2, "top_k": 3}.items():
        monkeypatch.setattr(engines.plain.model.network.generation_config, name, value)
    found = measure(engines, examples)
    for example in examples:
        assert found("block", example).token_ids == usual("block", example).token_ids
        assert found("block", example).divergence == usual("block", example).divergence
