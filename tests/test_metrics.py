"""Accuracy with several samples, its paired interval, and words of doubt."""

import itertools
import random

import numpy as np
import pytest

from trl_crisp.evaluation.metrics import epistemic_words, paired_bootstrap_difference, pass_at_k


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


def test_epistemic_words_are_counted_whole_in_any_case():
    assert epistemic_words("Wait, maybe it MIGHT be 4. Let me check: perhaps.") == 5
    assert epistemic_words("The waiter checked the mighty sum.") == 0
    assert epistemic_words("") == 0
