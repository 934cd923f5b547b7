"""The verdict on each instruction, and which one to train with, by rules that are stated here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trl_crisp.evaluation.metrics import Interval
from trl_crisp.health.judge import Judge
from trl_crisp.preflight.measuring import Effect

VerdictKind = Literal["shortens", "ignores", "lengthens", "answers otherwise", "uncertain"]

# Ours: fewer saved tokens than this are not worth a training, and a model that follows the instruction saves more
MIN_REDUCTION = 0.05
# Ours: lengths that differ by less are equally short
EQUALLY_SHORT = 0.02
# Ours: with more cut answers than this, as in measuring during training, numbers say more about the cap than about the model
MUCH_CUT = 0.1
# Rounding must not turn a fall of exactly the margin into more
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """
    A verdict on an instruction.

    Attributes:
        kind: See [`judge`].
        judged_by: What says whether the answers hold: `"accuracy"` if the rows have right answers, else `"agreement"`; `None` if neither
            could be measured.
        words: One or two sentences.
    """

    kind: VerdictKind
    judged_by: Judge | None
    words: str


@dataclass(frozen=True)
class Recommendation:
    """Which instruction to train with, by its name; `None`: none. And why, in words."""

    instruction: str | None
    words: str


def judge(
    name: str,
    effect: Effect,
    judged_by: Judge | None,
    margin: float,
    prompts: int,
    plain_truncated: float,
    max_completion_length: int,
) -> Verdict:
    """
    Return the verdict on an instruction. The first rule that applies:

    1. `"lengthens"`: the interval of the reduction lies below 0.
    2. `"ignores"`: the reduction is below 5%; `"uncertain"` instead if more than 10% of the plain answers were cut, because the cap may
       hide the reduction.
    3. `"answers otherwise"`: the interval of the change of accuracy (or agreement) lies below -margin.
    4. `"uncertain"`: the change is below -margin and its interval is not, or the interval of the reduction reaches 0.
    5. `"shortens"`: all others. The change is at least -margin, or could not be measured.

    Args:
        name: The instruction's name.
        effect: What it changes.
        judged_by: See [`~trl_crisp.health.judge.choose_judge`].
        margin: See [`~trl_crisp.preflight.settings.PreflightSettings`].
        prompts: How many were asked.
        plain_truncated: The share of plain answers that were cut. If they are many, the words of `"shortens"` warn.
        max_completion_length: The cap that cut them, in tokens.
    """
    reduction = effect.reduction
    change = {"accuracy": effect.accuracy_change, "agreement": effect.agreement_change, None: None}[judged_by]
    tokens = _tokens(reduction)
    shorter = f"{_percent(reduction.estimate)} [{_percent(reduction.low)}, {_percent(reduction.high)}]"
    measured = "" if change is None else f" at an {judged_by} change of {_points(change)}"
    allowed = f"the margin allows a fall of {100 * margin:g}"
    if reduction.high < 0:
        return Verdict(
            "lengthens", judged_by, f"{name}: answers get longer under it, {tokens}{measured}. Do not train with it."
        )
    if reduction.estimate < MIN_REDUCTION:
        if plain_truncated > MUCH_CUT:
            return Verdict(
                "uncertain",
                judged_by,
                f"{name}: {tokens}{measured}, but {plain_truncated:.0%} of the plain answers were cut at {max_completion_length:,} tokens, which "
                "hides how much shorter answers get under it. Raise --max_completion_length.",
            )
        return Verdict(
            "ignores",
            judged_by,
            f"{name}: this model ignores the instruction: {tokens}{measured}; {MIN_REDUCTION:.0%} is the least that counts. Do not train with it.",
        )
    if change is not None and change.high < -margin - _ROUNDING:
        return Verdict(
            "answers otherwise",
            judged_by,
            f"{name}: this model answers otherwise under it: {tokens}{measured}; {allowed}. Do not train with it.",
        )
    if change is not None and change.estimate < -margin - _ROUNDING:
        return Verdict(
            "uncertain",
            judged_by,
            f"{name} shortens by {shorter}{measured}; {allowed}, so its answers may not hold. {_more(prompts)}",
        )
    if reduction.low <= 0:
        words = f"{name} shortens by {shorter}{measured}; the interval reaches 0, so it may not. {_more(prompts)}"
        return Verdict("uncertain", judged_by, words)
    words = f"{name} shortens by {shorter}{measured}."
    if judged_by is None:
        words += " Whether its answers hold could not be measured."
    elif change is not None and change.low < -margin - _ROUNDING:
        words += f" {_enough(change, margin, prompts)}"
    if plain_truncated > MUCH_CUT:
        words += f" But {plain_truncated:.0%} of the plain answers were cut, which favours the shorter ones."
    return Verdict("shortens", judged_by, words)


def recommend(
    names: Sequence[str],
    verdicts: Sequence[Verdict],
    mean_tokens: Sequence[float],
    effects: Sequence[Effect],
    plain_truncated: float,
) -> Recommendation:
    """
    Return which instruction to train with.

    The rule: of those that shorten, the one with the fewest mean tokens. Within 2% of the fewest, the one with the better change of
    accuracy (or agreement); of equals, the first one that was given.

    Args:
        names, verdicts, mean_tokens, effects: One of each instruction, in the order that they were given.
        plain_truncated: As in [`judge`].
    """
    holding = [i for i, verdict in enumerate(verdicts) if verdict.kind == "shortens"]
    if not holding:
        if any(verdict.kind == "uncertain" for verdict in verdicts):
            # More prompts do not show what the cap hides
            advice = "raise --max_completion_length" if plain_truncated > MUCH_CUT else "ask more prompts (--prompts)"
            return Recommendation(None, f"No instruction can be recommended yet: {advice}, or do not train.")
        return Recommendation(
            None,
            "Do not train: under none of these instructions is this model shorter and its answers the same. Try another instruction, such as a "
            "text of your own.",
        )
    fewest = min(mean_tokens[i] for i in holding)
    short = [i for i in holding if mean_tokens[i] <= (1 + EQUALLY_SHORT) * fewest]
    best = max(short, key=lambda i: (_change_of(effects[i], verdicts[i].judged_by), -i))
    words = f"Train with {names[best]}"
    if len(names) > 1:
        words += f": of {len(names)} instructions the shortest whose answers hold"
    if len(short) > 1:
        words += f" ({', '.join(names[i] for i in short if i != best)} is as short)"
    if verdicts[best].judged_by is None:
        words = (
            f"{words.replace(' whose answers hold', '')}, by its tokens alone: whether the answers hold could not be measured, so read some of "
            "them first"
        )
    return Recommendation(names[best], f"{words}.")


def _change_of(effect: Effect, judged_by: Judge | None) -> float:
    change = effect.accuracy_change if judged_by == "accuracy" else effect.agreement_change
    return 0.0 if judged_by is None or change is None else change.estimate


def _percent(share: float, sign: str = "") -> str:
    # Adding 0 makes 0 of -0
    return f"{round(100 * share) + 0.0:{sign}.0f}%"


def _tokens(reduction: Interval) -> str:
    estimate, low, high = (_percent(-end, "+") for end in (reduction.estimate, reduction.high, reduction.low))
    return f"{estimate} tokens [{low}, {high}]"


def _points(change: Interval) -> str:
    estimate, low, high = (f"{round(100 * end, 1) + 0.0:+.1f}" for end in (change.estimate, change.low, change.high))
    return f"{estimate} points [{low}, {high}]"


def _more(prompts: int) -> str:
    return f"Ask more prompts (--prompts {4 * prompts} halves the interval)."


def _enough(change: Interval, margin: float, prompts: int) -> str:
    """Say that the interval reaches below the margin, and how many prompts would settle it: its width falls with their square root."""
    distance = change.estimate + margin
    reach = f"{prompts} prompts cannot exclude a larger fall than the margin of {100 * margin:.1f} points"
    if distance < margin / 4:
        return f"{reach}."
    needed = math.ceil(prompts * ((change.estimate - change.low) / distance) ** 2)
    return f"{reach}; about {needed} would."
