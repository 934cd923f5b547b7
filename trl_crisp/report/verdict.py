"""The verdict of a page: whether a checkpoint is shorter and as right as its base, in words.

The first level that applies is the verdict. Each reason that holds is told.

No verdict
    - There is no baseline, or fewer than two problems, so there is no interval.
    - More than half of the answers could not be read, before or after.
    - The base is right in at most the margin of its answers, and accuracy did not rise: such a base has nothing to lose, so nothing shows
      that right answers are kept. What is under "do not use" comes before this rule, except for accuracy.

Do not use
    - Accuracy is below the base by more than the margin, and its 95% interval is below zero.
    - Answers are longer than the base's: the interval of the reduction is below zero.
    - Most answers end in repetition: half of them or more, and at least 25 points more than before.

Caution
    - Accuracy fell by at most the margin, and its interval is below zero.
    - Fewer than 64 problems were measured.
    - The interval of accuracy reaches below the margin, so a larger loss is not excluded. If accuracy changed on no problem, the bootstrap's
      interval has no width and shows nothing. Then a loss is excluded from the share s on at which n problems without any loss have a chance
      of 2.5%: (1 - s)^n = 0.025. With a margin of 3 points this takes 122 problems.
    - The interval of the reduction reaches zero, so a saving is not shown.
    - A group of problems, of any size, lost more than the margin, with its whole interval.
    - Unread answers rose by more than 5 points, and the interval is above zero.
    - More than 10% of the answers were cut at the budget, before or after: lengths and accuracy then speak of the cap.
    - The run's signals were unhealthy at the checkpoint's step.

Use
    - None of these.

"Use" so takes 64 problems, a saving, and a loss beyond the margin that the measurement excludes.

The margin is 3 points: that of `monitor_margin`. The 64 problems are those that a comparison without an interval asks for; below them the
bootstrap's interval is too narrow. The rules of unread, cut and repeating answers are those of `trl-crisp eval`, of
measuring during training, and of the health signals. The 5 points of unread answers are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trl_crisp.report.formats import change_of_tokens, interval_in_points, interval_of_tokens, percent, points

Level = Literal["use", "caution", "do not use", "no verdict"]

MARGIN = 0.03
MOST = 0.5
REPEATS_RISE = 0.25
UNREAD_RISE = 0.05
MUCH_CUT = 0.1
FEWEST_PROBLEMS = 64
# Outside of each end of a 95% interval
_TAIL = 0.025
# Rounding of the shares must not turn a drop of exactly the margin into a larger one
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Measured:
    """
    What a verdict rests on. An interval is a mapping with `estimate`, `low` and `high`; shares are in [0, 1].

    Attributes:
        reduction: 1 - mean tokens / the base's. `low` and `high` are `None` if only the means are known.
        accuracy: The change of accuracy.
        subject: What `accuracy` is: "accuracy", or the agreement with the base's majority answers.
        unread: The change of the share of unread answers.
        unread_shares, cut_shares, repeats_shares: Before and after; `None` if they were not measured.
        groups: The change of accuracy in groups of problems, by a name such as "problems of level 5".
        base_level: The base's accuracy; `None` if unknown.
        problems: How many there are; `None` if unknown.
    """

    reduction: Mapping[str, Any] | None
    accuracy: Mapping[str, Any] | None
    subject: str = "accuracy"
    unread: Mapping[str, Any] | None = None
    unread_shares: tuple[float, float] | None = None
    cut_shares: tuple[float, float] | None = None
    repeats_shares: tuple[float, float] | None = None
    groups: Mapping[str, Mapping[str, Any] | None] | None = None
    base_level: float | None = None
    problems: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A level, a headline that holds the numbers, and the reasons."""

    level: Level
    headline: str
    reasons: tuple[str, ...] = ()


def judge(measured: Measured | None, margin: float = MARGIN, unhealthy: str | None = None) -> Verdict:
    """
    Return the verdict by the rules above.

    Args:
        measured: `None` if there is nothing to compare with.
        margin: The largest loss of accuracy that is accepted, as a share of all answers.
        unhealthy: A sentence that says so, if the signals of the run were unhealthy at the checkpoint's step.
    """
    signals = [] if unhealthy is None else [unhealthy]
    if measured is None:
        return Verdict("no verdict", "No verdict: there is no baseline to compare with", tuple(signals))
    reduction, accuracy = measured.reduction, measured.accuracy
    if reduction is None or accuracy is None:
        count = "" if measured.problems is None else f" of {measured.problems} problem(s)"
        return Verdict(
            "no verdict",
            f"No verdict: a comparison{count} has no interval",
            (f"Measure at least {FEWEST_PROBLEMS} problems.", *signals),
        )
    numbers = f"{_tokens_in_words(reduction)}, {_accuracy_in_words(measured, margin)}"
    if measured.unread_shares is not None and max(measured.unread_shares) > MOST:
        before, after = (percent(share, 0) for share in measured.unread_shares)
        reason = (
            f"Most answers could not be read: {before} before, {after} after. Accuracy then says little. Check the answers in "
            "samples.jsonl, the prompt and the grader."
        )
        return Verdict("no verdict", "No verdict: most answers could not be read", (reason, *signals))
    if bad := _reasons_against(measured, margin):
        return Verdict("do not use", f"Do not use this checkpoint: {numbers}", (*bad, *signals))
    if measured.base_level is not None and measured.base_level <= margin + _ROUNDING and accuracy["low"] <= 0:
        reason = (
            f"{_capital(measured.subject)} of the base is {percent(measured.base_level)}, so it has nothing to lose, and nothing shows that "
            "right answers are kept. Measure problems that the base solves."
        )
        return Verdict(
            "no verdict",
            "No verdict: the base solves next to nothing",
            (reason, *_doubts_of_reading(measured), *signals),
        )
    doubts = [*_doubts(measured, margin), *signals]
    if doubts:
        return Verdict("caution", f"Use with caution: {numbers}", tuple(doubts))
    return Verdict("use", numbers[0].upper() + numbers[1:])


def _tokens_in_words(reduction: Mapping[str, Any]) -> str:
    share = reduction["estimate"]
    if reduction.get("low") is None:
        return f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} tokens"
    low, high = sorted(abs(reduction[key]) for key in ("low", "high"))
    if reduction["low"] > 0 or reduction["high"] < 0:
        return f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} tokens [{low:.0%}, {high:.0%}]"
    return f"tokens {interval_of_tokens(reduction)}"


def _accuracy_in_words(measured: Measured, margin: float) -> str:
    change = measured.accuracy
    assert change is not None
    if change["low"] > 0:
        word = "rose"
    elif change["high"] < 0:
        word = "fell"
    else:
        word = "kept" if _largest_loss(measured) <= margin + _ROUNDING else "unclear"
    return f"{measured.subject} {word}: {interval_in_points(change)}"


def _largest_loss(measured: Measured) -> float:
    """Return the largest loss of accuracy that the measurement does not exclude."""
    change = measured.accuracy
    assert change is not None
    if change["low"] == change["high"] == 0:
        return 1.0 if measured.problems is None else 1 - _TAIL ** (1 / measured.problems)
    return float(-change["low"])


def _reasons_against(measured: Measured, margin: float) -> list[str]:
    reduction, accuracy = measured.reduction, measured.accuracy
    assert reduction is not None
    assert accuracy is not None
    reasons = []
    if accuracy["estimate"] < -margin - _ROUNDING and accuracy["high"] < 0:
        reasons.append(
            f"{_capital(measured.subject)} fell by {points(-accuracy['estimate'])[1:]}, more than the margin of {100 * margin:g}, and "
            "the interval is below zero."
        )
    high = reduction["estimate"] if reduction.get("high") is None else reduction["high"]
    if high < 0:
        reasons.append("Answers are longer than the base's.")
    if measured.repeats_shares is not None:
        before, after = measured.repeats_shares
        if after >= MOST and after >= before + REPEATS_RISE:
            reasons.append(f"Most answers end in repetition: {percent(after, 0)}, before {percent(before, 0)}.")
    return reasons


def _doubts(measured: Measured, margin: float) -> list[str]:
    reduction, accuracy = measured.reduction, measured.accuracy
    assert reduction is not None
    assert accuracy is not None
    reasons = []
    if accuracy["high"] < 0:
        reasons.append(f"{_capital(measured.subject)} fell, by no more than the margin of {100 * margin:g} points.")
    if measured.problems is not None and measured.problems < FEWEST_PROBLEMS:
        reasons.append(f"{measured.problems} problems are few: measure at least {FEWEST_PROBLEMS}.")
    if (loss := _largest_loss(measured)) > margin + _ROUNDING:
        unchanged = accuracy["low"] == accuracy["high"] == 0
        if unchanged and measured.problems is None:
            reasons.append(
                f"{_capital(measured.subject)} changed on no problem, and an interval without width shows nothing."
            )
        else:
            more = "problems" if unchanged else "problems or samples"
            reasons.append(
                f"A loss of up to {points(loss)[1:]} of {measured.subject} is not excluded. Measure more {more}."
            )
    low = reduction["estimate"] if reduction.get("low") is None else reduction["low"]
    if low <= 0:
        reasons.append(f"A saving is not shown: tokens {_tokens_text(reduction)}.")
    for name, change in (measured.groups or {}).items():
        if change is not None and change["high"] < -margin - _ROUNDING:
            reasons.append(f"Accuracy fell on {name}: {interval_in_points(change)}.")
    return [*reasons, *_doubts_of_reading(measured)]


def _doubts_of_reading(measured: Measured) -> list[str]:
    """Return why accuracy and lengths may not be those of the models: unread answers and cut ones."""
    reasons = []
    if measured.unread is not None and measured.unread["estimate"] > UNREAD_RISE and measured.unread["low"] > 0:
        reasons.append(f"More answers could not be read than before: {interval_in_points(measured.unread)}.")
    if measured.cut_shares is not None and max(measured.cut_shares) > MUCH_CUT:
        before, after = (percent(share, 0) for share in measured.cut_shares)
        reasons.append(
            f"Many answers were cut at the budget: {before} before, {after} after. Lengths and accuracy then speak of the cap; raise "
            "--max-new-tokens."
        )
    return reasons


def _tokens_text(reduction: Mapping[str, Any]) -> str:
    has_interval = reduction.get("low") is not None
    return interval_of_tokens(reduction) if has_interval else change_of_tokens(reduction["estimate"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
