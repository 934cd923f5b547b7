"""Accuracy with several samples, and paired intervals."""

import itertools
import random

import numpy as np
import pytest

from trl_crisp.evaluation.metrics import (
    paired_bootstrap_difference,
    paired_bootstrap_reduction,
    pass_at_k,
    share,
)


def test_pass_at_k_is_the_share_of_all_draws_of_k():
    rng = random.Random(0)
    correct = [[rng.random() < share for _ in range(6)] for share in (0.0, 0.2, 0.5, 0.9, 1.0)]
    for k in range(1, 7):
        by_counting = np.mean(
            [np.mean([any(draw) for draw in itertools.combinations(samples, k)]) for samples in correct]
        )
        assert pass_at_k(correct, k) == pytest.approx(by_counting)
    assert pass_at_k(correct, 1) == pytest.approx(np.mean(correct))


@pytest.mark.parametrize(("correct", "k"), [([], 1), ([[True]], 2), ([[True]], 0), ([[True, False], []], 1)])
def test_pass_at_k_that_is_not_defined_is_refused(correct, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(correct, k)


def test_the_interval_of_a_difference_is_that_of_plain_loops():
    rng = np.random.default_rng(1)
    before = rng.random((60, 8)) < 0.5
    after = before.copy()
    after[:30, :3] = True
    got = paired_bootstrap_difference(before, after)
    assert got.estimate == pytest.approx(after.mean() - before.mean())
    # By loops, with draws of its own
    differences = after.mean(axis=1) - before.mean(axis=1)
    draws = random.Random(2)
    means = sorted(np.mean([differences[draws.randrange(60)] for _ in range(60)]) for _ in range(4000))
    assert got.low == pytest.approx(means[100], abs=0.01)
    assert got.high == pytest.approx(means[3900], abs=0.01)
    same = paired_bootstrap_difference(before, before)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="60 problems before and 59 after"):
        paired_bootstrap_difference(before, after[:59])


def test_the_interval_is_that_of_plain_loops() -> None:
    generator = np.random.default_rng(4)
    before = generator.integers(20, 400, size=40)
    after = (before * generator.uniform(0.3, 1.1, size=40)).round()
    got = paired_bootstrap_reduction(before, after, resamples=4000, seed=1)
    assert got.estimate == pytest.approx(1 - sum(after.tolist()) / sum(before.tolist()))
    other = np.random.default_rng(99)
    reductions = []
    for _ in range(4000):
        rows = [int(other.integers(40)) for _ in range(40)]
        reductions.append(1 - sum(float(after[row]) for row in rows) / sum(float(before[row]) for row in rows))
    reductions.sort()
    assert got.low == pytest.approx(reductions[100], abs=0.01)
    assert got.high == pytest.approx(reductions[3900], abs=0.01)


def test_interval_of_the_same_factor_everywhere_is_a_point() -> None:
    before = np.arange(1, 101)
    got = paired_bootstrap_reduction(before, 0.75 * before)
    assert (got.estimate, got.low, got.high) == pytest.approx((0.25, 0.25, 0.25))
    assert got.excludes(0)
    assert not got.excludes(got.estimate)


def test_interval_covers_a_known_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits, trials = 0, 200
    for trial in range(trials):
        before = generator.exponential(100, size=64)
        after = before * 0.8 + generator.normal(0, 20, size=64)
        got = paired_bootstrap_reduction(before, after, resamples=500, seed=trial)
        hits += not got.excludes(0.2)
    # 95% of 200 trials is 190, with a standard deviation of 3; percentile intervals of 64 problems run a little short
    assert 0.89 <= hits / trials <= 0.99


def test_samples_of_a_problem_are_averaged_first() -> None:
    before, after = np.array([[10, 30], [40, 40], [5, 15]]), np.array([[5, 15], [30, 30], [10, 10]])
    assert paired_bootstrap_reduction(before, after) == paired_bootstrap_reduction([20, 40, 10], [10, 30, 10])


@pytest.mark.parametrize(
    ("before", "after", "arguments", "message"),
    [
        ([1, 2], [1], {}, "2 problems before and 1 after"),
        ([1], [1], {}, "no interval"),
        ([0, 0], [1, 1], {}, "length 0"),
        ([1, 2], [1, 2], {"confidence": 95}, "confidence is 95"),
        ([[[1]]], [[[1]]], {}, "shape"),
    ],
)
def test_an_interval_that_is_not_defined_is_refused(
    before: list, after: list, arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap_reduction(before, after, **arguments)  # type: ignore[arg-type]


def test_a_share_is_of_at_least_one_flag() -> None:
    assert share([True, False, False, True]) == 0.5
    with pytest.raises(ValueError, match="no answers"):
        share([])
