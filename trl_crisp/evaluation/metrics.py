"""What is counted in answers: accuracy, lengths with intervals, shares, repetition. Plain numpy, no torch."""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The rule by which collapse was found in on-policy distillation: the last 10,000 characters compress more than 10x
COMPRESSED_TAIL_CHARACTERS = 10_000
COMPRESSION_RATIO_LIMIT = 10.0
# Ours, because a text under some 1,000 characters cannot compress 10x whatever it says. Four copies are more than the
# parallel sentences of a worked solution, and 60 characters more than a ruler or "1, 1, 1" in a list.
LOOP_COPIES = 4
LOOP_CHARACTERS = 60
# Ours: a few tens of MB, where MMLU's 14,042 problems would take GBs
_DRAWN_AT_ONCE = 2**22
# The words whose loss was seen to go with lost accuracy in self-distillation (epistemic suppression)
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
    """The reduction 1 - mean(after) / mean(before), with a percentile bootstrap interval over problems.

    Both arrays are [problems] or [problems, samples], row i of both being the same problem; samples are averaged first,
    so that problems are what is drawn. Each resample draws the same problems for both sides, which keeps the spread
    between problems out of the interval. The sampling noise within a problem is in it; 10,000 resamples are ours, they
    settle the ends to about a tenth of a point.

    Raises `ValueError` for arrays of different lengths, fewer than two problems, a mean of zero before, or a confidence
    outside (0, 1).
    """
    before, after = _paired(before_tokens, after_tokens, confidence)
    if before.sum() == 0:
        raise ValueError(
            "All answers before have length 0, so a reduction is not defined: check how they were sampled."
        )
    sums_before, sums_after = _resampled_sums((before, after), resamples, seed)
    # A resample of only empty answers has no reduction; with lengths above 0 on most problems it does not occur
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
    """The difference mean(after) - mean(before), such as that of two accuracies, with a percentile bootstrap interval.

    Arrays, resampling and errors are those of [`paired_bootstrap_reduction`].
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
    """The chance that at least one of k answers to a problem is correct: the unbiased estimate, mean over problems.

    `correct` holds the samples of each problem, at least k of them each; with k = 1 it is mean@k of all samples. Raises
    `ValueError` for no problems, or a problem with fewer samples than k.
    """
    if not len(correct):
        raise ValueError("pass@k of no problems is not defined: pass at least one.")
    shares = []
    for samples in correct:
        n, right = len(samples), sum(bool(flag) for flag in samples)
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} of a problem with {n} samples: k has to be between 1 and the samples.")
        # 1 - C(n - right, k) / C(n, k): all k drawn from the wrong ones
        shares.append(1 - math.comb(n - right, k) / math.comb(n, k))
    return float(np.mean(shares))


def epistemic_words(text: str) -> int:
    """How many words of doubt and checking a text has (wait, perhaps, maybe ...)."""
    return len(_EPISTEMIC.findall(text))


def _problem_means(tokens: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(tokens, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise ValueError(f"Lengths of shape {values.shape}: give [problems] or [problems, samples].")
    return values if values.ndim == 1 else values.mean(axis=1)


def share(flags: Sequence[bool]) -> float:
    """The share of true flags, in [0, 1]. Raises `ValueError` for no flags at all."""
    if not len(flags):
        raise ValueError("The share of no answers is not defined: pass at least one flag.")
    return float(np.mean(np.asarray(flags, dtype=bool)))


def compresses(text: str) -> bool:
    """Whether an answer's last 10,000 characters compress more than 10x with zlib: the rule for collapse, of long answers."""
    data = text.rstrip()[-COMPRESSED_TAIL_CHARACTERS:].encode()
    return len(data) > COMPRESSION_RATIO_LIMIT * len(zlib.compress(data))


def repeats_itself(text: str) -> bool:
    """Whether an answer has run into repetition, by either of two rules.

    1. Its last 10,000 characters compress more than 10x with zlib: the rule for long answers.
    2. It ends in a loop: the same characters at least four times in a row, the last copy possibly cut, over at least 60
       characters, white space at the end aside. Short answers cannot meet the first rule.

    A loop that is left again before the end is seen by the first rule alone; so is one whose copies differ in a number.
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
