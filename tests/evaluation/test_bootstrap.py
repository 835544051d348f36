"""The paired bootstrap: hand-made cases, coverage, and what pairing is for."""

from __future__ import annotations

import numpy as np
import pytest

from fedklpr_jax.errors import InputError
from fedklpr_jax.evaluation import paired_ratio_interval

NAN = float("nan")


def test_the_ratio_is_of_means_over_seeds_and_clients():
    # Client means: ours 0.5, 0.9, 0.1, 0.5 (mean 0.5), theirs 0.2, 0.6, 0.2, 0.6 (mean 0.4).
    ours = [[[0.4, 0.6], [0.9]], [[0.1, NAN, 0.1], [0.5]]]
    theirs = [[[0.1, 0.3], [0.6]], [[0.2, NAN, 0.2], [0.6]]]
    result = paired_ratio_interval(ours, theirs, samples=200)
    assert result._fields == ("ratio", "low", "high")
    assert result.ratio == pytest.approx(0.5 / 0.4)
    # Only the first pair varies: its means lie in [0.4, 0.6] and [0.1, 0.3], and go together.
    assert result.low == pytest.approx((0.6 + 1.5) / (0.3 + 1.4)) and result.high == pytest.approx(1.9 / 1.5)


def test_the_same_rows_are_drawn_for_both():
    aps = np.random.default_rng(0).random(30)
    result = paired_ratio_interval([[0.8 * aps]], [[aps]])
    np.testing.assert_allclose(result, 0.8, rtol=1e-12)


def test_invalid_queries_are_never_drawn():
    aps = np.array([0.2, NAN, 0.4, NAN])
    np.testing.assert_allclose(paired_ratio_interval([[aps]], [[aps]]), 1.0)


def test_seeded_and_independent_of_the_global_state():
    rng = np.random.default_rng(1)
    ours, theirs = [[rng.random(40)]], [[rng.random(40)]]
    first = paired_ratio_interval(ours, theirs, seed=3)
    assert first == paired_ratio_interval(ours, theirs, seed=3)
    assert first != paired_ratio_interval(ours, theirs, seed=4)


def test_a_higher_level_and_fewer_queries_widen_the_interval():
    rng = np.random.default_rng(2)
    ours, theirs = rng.random(400), rng.random(400)

    def width(count, level):
        result = paired_ratio_interval([[ours[:count]]], [[theirs[:count]]], level=level)
        assert result.low < result.ratio < result.high
        return result.high - result.low

    assert width(400, 0.5) < width(400, 0.95) < width(40, 0.95)


def test_the_interval_agrees_with_the_delta_method():
    rng = np.random.default_rng(4)
    theirs = rng.uniform(0.3, 0.9, 2000)
    ours = theirs + rng.normal(0, 0.1, 2000)
    result = paired_ratio_interval([[ours]], [[theirs]], samples=4000)
    error = (ours - result.ratio * theirs).std() / theirs.mean() / np.sqrt(2000)
    expected = result.ratio + np.array([-1.96, 1.96]) * error
    np.testing.assert_allclose([result.low, result.high], expected, atol=error / 5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        theirs = rng.uniform(0.2, 1.0, 60)
        ours = theirs * rng.uniform(0.8, 1.2, 60)
        result = paired_ratio_interval([[ours]], [[theirs]], samples=300, seed=trial, level=0.9)
        covered += result.low <= 1.0 <= result.high
    # Binomial(200, 0.9): mean 180, standard deviation 4.2.
    assert 163 <= covered <= 195


def test_samples_in_which_theirs_is_zero_leave_the_upper_end_open():
    result = paired_ratio_interval([[[0.5, 0.5]]], [[[0.0, 1.0]]])
    assert result.ratio == 1.0 and result.low == 0.5 and result.high == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ours": []}, "theirs: other seeds"),
        ({"theirs": [[[0.1, 0.2]], [[0.1]]]}, "theirs: other seeds"),
        ({"ours": [[]], "theirs": [[]]}, "ours: no client"),
        ({"theirs": [[[0.1]]]}, "seed 0, client 0: shapes (2,) and (1,)"),
        ({"theirs": [[[0.1, NAN]]]}, "seed 0, client 0: other queries"),
        ({"ours": [[[NAN]]], "theirs": [[[NAN]]]}, "seed 0, client 0: no valid query"),
        ({"theirs": [[[0.0, 0.0]]]}, "theirs: the mean AP is 0"),
        ({"samples": 0}, "samples: 0"),
        ({"level": 95}, "level: 95"),
    ],
)
def test_mistakes_stop_with_one_line(change, message):
    arguments = {"ours": [[[0.1, 0.2]]], "theirs": [[[0.1, 0.2]]]} | change
    with pytest.raises(InputError) as caught:
        paired_ratio_interval(**arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
