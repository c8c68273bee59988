"""Intervals hold what they say, pairs cancel what they share, and rows of one question go together."""

import math

import numpy as np
import pytest

from rag_blockcache.evaluation.bootstrap import FEWEST, Interval, Resamples


def test_the_first_draw_is_the_sample_itself():
    draws = Resamples(range(4)).ratio([1, 2, 3, 4], [2, 2, 2, 4])
    assert draws[0] == 1.0
    assert len(draws) == 2001
    assert Resamples(range(4)).ratio([1, 2, 3, 6])[0] == 3.0


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    interval = Interval.of(Resamples(range(400)).ratio(values))
    reach = 1.96 * values.std() / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.03)


def test_a_difference_of_pairs_is_surer_than_that_of_strangers():
    generator = np.random.default_rng(2)
    one = generator.normal(0.0, 1.0, 200)
    other = one + 0.1 + generator.normal(0.0, 0.01, 200)
    pairs, strangers = Resamples(range(200)), Resamples(range(200), seed=1)
    paired = Interval.of(pairs.ratio(other) - pairs.ratio(one))
    unpaired = Interval.of(strangers.ratio(other) - pairs.ratio(one))
    assert not paired.holds_zero
    assert unpaired.holds_zero
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 10


def test_a_ratio_of_sums_weighs_questions_by_their_denominators():
    # A question of 99 tokens counts 99 times as much as one of a single token.
    assert Resamples(range(2)).ratio([99, 0], [99, 1])[0] == pytest.approx(0.99)


def test_rows_of_one_question_are_drawn_together():
    values = np.random.default_rng(3).normal(0.0, 1.0, 100)
    alone = Interval.of(Resamples(range(100)).ratio(values))
    twice = Interval.of(Resamples([*range(100), *range(100)]).ratio([*values, *values]))
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low)


def test_equal_seeds_give_equal_draws_and_others_do_not():
    values = [1.0, 2.0, 5.0]
    assert (Resamples(range(3)).ratio(values) == Resamples("abc").ratio(values)).all()
    assert (Resamples(range(3)).ratio(values) != Resamples(range(3), seed=1).ratio(values)).any()


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-1, 1, True), (0, 1, True), (0.1, 1, False), (-2, -1, False)]
)
def test_a_difference_is_clear_only_when_its_interval_leaves_zero_out(low, high, expected):
    assert Interval((low + high) / 2, low, high).holds_zero is expected


def test_resamples_with_nothing_to_divide_by_are_left_out():
    draws = Resamples(range(4)).ratio([1, 0, 0, 0], [2, 0, 0, 0])  # a third of them draw the first not once
    assert np.isnan(draws).any()
    assert Interval.of(draws) == Interval(0.5, 0.5, 0.5)
    assert Interval.of(1 - Resamples(range(4)).ratio([1, 1, 0, 0], [1, 0, 0, 0])).low > -math.inf


def test_fewer_questions_than_the_fewest_show_nothing_even_if_all_point_one_way():
    assert 2 * 0.5**FEWEST < 0.05 < 2 * 0.5 ** (FEWEST - 1)
