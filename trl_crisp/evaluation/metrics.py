"""Measures of answers: accuracy, lengths with intervals, shares, repetition. Plain numpy, no torch."""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The rule for collapse in on-policy distillation: the last 10,000 characters compress more than 10x
COMPRESSED_TAIL_CHARACTERS = 10_000
COMPRESSION_RATIO_LIMIT = 10.0
# Ours, because a text below about 1,000 characters cannot compress 10x. Four copies are more than the parallel sentences of a
# worked solution, and 60 characters are more than a ruler or "1, 1, 1" in a list.
LOOP_COPIES = 4
LOOP_CHARACTERS = 60
# Ours: this takes some tens of MB; drawn all at once, MMLU's 14,042 problems would take GBs
_DRAWN_AT_ONCE = 2**22
# In self-distillation, fewer of these words went along with lower accuracy (epistemic suppression)
EPISTEMIC_WORDS = ("wait", "hmm", "perhaps", "maybe", "actually", "alternatively", "seems", "might", "likely", "check")
_EPISTEMIC = re.compile(rf"\b(?:{'|'.join(EPISTEMIC_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval at the given confidence (0.95: 95%)."""

    estimate: float
    low: float
    high: float
    confidence: float

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside of the interval."""
        return value < self.low or value > self.high


def paired_bootstrap_reduction(
    before_tokens: ArrayLike,
    after_tokens: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the reduction 1 - mean(after) / mean(before), with a percentile bootstrap interval over problems.

    Both arrays are [problems] or [problems, samples], and row i is the same problem in both. The samples of a problem are
    averaged first. Each resample draws the same problems for both sides, so the spread between problems is not in the
    interval; the sampling noise within a problem is. The 10,000 resamples are ours: with them the ends of the interval vary
    by about a tenth of a point.

    Raises `ValueError` if the arrays have different lengths or fewer than two problems, the mean before is zero, or the
    confidence is outside (0, 1).
    """
    before, after = _paired(before_tokens, after_tokens, confidence)
    if before.sum() == 0:
        raise ValueError(
            "All answers before have length 0, so a reduction is not defined: check how they were sampled."
        )
    sums_before, sums_after = _resampled_sums((before, after), resamples, seed)
    # A resample of only empty answers has no reduction; it does not occur if most problems have answers
    valid = sums_before > 0
    reductions = 1 - sums_after[valid] / sums_before[valid]
    return _interval(1 - after.mean() / before.mean(), reductions, confidence)


def paired_bootstrap_difference(
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the difference mean(after) - mean(before), for example of two accuracies, with a percentile bootstrap interval.

    Arrays, resampling and errors are as in [`paired_bootstrap_reduction`].
    """
    first, second = _paired(before, after, confidence)
    differences = second - first
    (sums,) = _resampled_sums((differences,), resamples, seed)
    return _interval(differences.mean(), sums / len(differences), confidence)


def _paired(before: ArrayLike, after: ArrayLike, confidence: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _problem_means(before), _problem_means(after)
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} problems before and {len(second)} after: a paired interval needs the same problems on both "
            "sides, in the same order."
        )
    if len(first) < 2:
        raise ValueError(f"{len(first)} problem(s) have no interval: measure at least two, better 64 or more.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95.")
    return first, second


def _resampled_sums(
    columns: Sequence[NDArray[np.float64]], resamples: int, seed: int
) -> tuple[NDArray[np.float64], ...]:
    """Each column's sum over problems that are drawn with replacement, the same ones for all columns: [resamples] each."""
    rng, problems = np.random.default_rng(seed), len(columns[0])
    sums = [np.empty(resamples) for _ in columns]
    chunk = max(1, _DRAWN_AT_ONCE // problems)
    for first in range(0, resamples, chunk):
        drawn = rng.integers(problems, size=(min(chunk, resamples - first), problems))
        for column, values in zip(columns, sums, strict=True):
            values[first : first + chunk] = column[drawn].sum(axis=1)
    return tuple(sums)


def _interval(estimate: float, values: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high), confidence)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Return the chance that at least one of k answers to a problem is correct: the unbiased estimate, averaged over problems.

    `correct` holds the samples of each problem, at least k per problem. With k = 1 it is the accuracy over all samples. Raises
    `ValueError` if there is no problem, or a problem has fewer samples than k.
    """
    if not len(correct):
        raise ValueError("pass@k of no problems is not defined: pass at least one.")
    shares = []
    for samples in correct:
        n, right = len(samples), sum(bool(flag) for flag in samples)
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} of a problem with {n} samples: k has to be between 1 and the samples.")
        # 1 - C(n - right, k) / C(n, k): C(n - right, k) draws have only wrong answers
        shares.append(1 - math.comb(n - right, k) / math.comb(n, k))
    return float(np.mean(shares))


def epistemic_words(text: str) -> int:
    """Return how many words of doubt and checking a text has (wait, perhaps, maybe ...)."""
    return len(_EPISTEMIC.findall(text))


def _problem_means(tokens: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(tokens, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise ValueError(f"Lengths of shape {values.shape}: give [problems] or [problems, samples].")
    return values if values.ndim == 1 else values.mean(axis=1)


def share(flags: Sequence[bool]) -> float:
    """Return the share of true flags, in [0, 1]. Raises `ValueError` if there are no flags."""
    if not len(flags):
        raise ValueError("The share of no answers is not defined: pass at least one flag.")
    return float(np.mean(np.asarray(flags, dtype=bool)))


def compresses(text: str) -> bool:
    """Whether an answer's last 10,000 characters compress more than 10x with zlib: the rule for collapse of long answers."""
    data = text.rstrip()[-COMPRESSED_TAIL_CHARACTERS:].encode()
    return len(data) > COMPRESSION_RATIO_LIMIT * len(zlib.compress(data))


def repeats_itself(text: str) -> bool:
    """Whether an answer ends in repetition, by either of two rules.

    1. Its last 10,000 characters compress more than 10x with zlib: the rule for long answers.
    2. It ends in a loop: the same characters at least four times in a row, over at least 60 characters. The
       last copy may be cut, and white space at the end does not count. Short answers cannot meet the first rule.

    Only the first rule finds a loop that ends before the answer does, or a loop whose copies differ in a number.
    """
    tail = text.rstrip()[-COMPRESSED_TAIL_CHARACTERS:]
    if not tail:
        return False
    return compresses(text) or _ends_in_loop(tail)


def _ends_in_loop(text: str) -> bool:
    reversed_text = text[::-1]
    # matches[p]: how many characters at the end equal those p places before them (the Z function of the reversed text)
    matches = _prefix_matches(reversed_text)
    return any(
        matches[period] + period >= max(LOOP_COPIES * period, LOOP_CHARACTERS)
        for period in range(1, len(text) // LOOP_COPIES + 1)
    )


def _prefix_matches(text: str) -> list[int]:
    """For each place, the length of the longest run there that the text also starts with; linear in the length."""
    matches = [0] * len(text)
    left = right = 0
    for place in range(1, len(text)):
        if place < right:
            matches[place] = min(right - place, matches[place - left])
        while place + matches[place] < len(text) and text[matches[place]] == text[place + matches[place]]:
            matches[place] += 1
        if place + matches[place] > right:
            left, right = place, place + matches[place]
    return matches
