"""Paired comparisons: figures worked by hand, and the regression against scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tasks.paired import bootstrapped, estimate, length_controlled, standardised_gain, wins


def test_wins_count_ties_as_half():
    won = wins(np.array([1.0, 0.0, 0.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert won.tolist() == [1.0, 0.5, 0.0, 1.0]
    assert estimate(won).value == 0.625


def test_resamples_are_drawn_in_pairs_with_replacement():
    drawn = []

    def of(counts):
        drawn.append(counts)
        return counts[:, 0]

    found = bootstrapped(4, of)
    assert found.value == 1.0
    assert all(np.all(counts.sum(1) == 4) for counts in drawn)
    # A prompt is drawn Binomial(4, 1/4) times: at most 3 times in 97.5 % of the resamples, and 0 times in over 2.5 %.
    assert (found.lower, found.upper) == (0.0, 3.0)


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(100):
        found = estimate((generator.random(150) < 0.7).astype(float))
        inside += found.lower <= 0.7 <= found.upper
    assert 88 <= inside <= 100  # Binomial(100, 0.95) is outside of this once in 300


def test_gain_is_in_standard_deviations_of_the_second():
    # Scores 0, 2, 4 have the mean 2 and the standard deviation sqrt(8 / 3).
    found = standardised_gain(np.array([3.0, 3.0, 3.0]), np.array([0.0, 2.0, 4.0]))
    assert found.value == pytest.approx(1 / np.sqrt(8 / 3))
    assert standardised_gain(np.array([5.0, 6.0]), np.array([1.0, 1.0])).value == 0.0


def test_gain_has_no_unit():
    first, second = np.random.default_rng(0).normal(size=(2, 50))
    one, other = standardised_gain(first, second), standardised_gain(10 * first + 3, 10 * second + 3)
    assert (one.value, one.lower, one.upper) == pytest.approx((other.value, other.lower, other.upper))


def test_length_controlled_rate_is_that_of_the_regression():
    generator = np.random.default_rng(1)
    longer_by = generator.normal(30, 40, 300).round()
    length = np.tanh(longer_by / longer_by.std())
    won = (generator.random(300) < 1 / (1 + np.exp(-(0.3 + 1.5 * length)))).astype(float)
    won[:10] = 0.5
    # A tie is half a win and half a loss.
    features, labels, weights = np.tile(length, 2)[:, None], np.repeat([1, 0], 300), np.concatenate([won, 1 - won])
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(features, labels, sample_weight=weights)
    found = length_controlled(won, longer_by)
    assert found.value == pytest.approx(float(1 / (1 + np.exp(-model.intercept_[0]))), abs=1e-6)
    assert found.lower < found.value < found.upper
    assert found.value < won.mean() - 0.1, "a part of the wins was length"


def test_what_length_alone_wins_is_an_even_game_at_equal_length():
    # Wins are where the answer is longer, losses where it is shorter, mirrored: by symmetry the intercept is 0.
    longer_by = np.array([-30, -20, -10, 10, 20, 30], dtype=float)
    assert length_controlled((longer_by > 0).astype(float), longer_by).value == pytest.approx(0.5)


@pytest.mark.parametrize("longer_by", [np.zeros(4), np.array([1.0, 1.0, -1.0, -1.0])])
def test_lengths_that_say_nothing_change_nothing(longer_by):
    won = np.array([1.0, 0.0, 1.0, 1.0]) if not longer_by.any() else np.array([1.0, 0.0, 1.0, 0.0])
    assert length_controlled(won, longer_by).value == pytest.approx(won.mean())


def test_a_rival_that_never_wins_leaves_no_doubt():
    found = length_controlled(np.ones(20), np.arange(20.0))
    assert (found.lower, found.value) == (pytest.approx(1.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
