"""Verdicts and recommendations follow the stated rules, on handmade intervals."""

import pytest

from trl_crisp.evaluation.metrics import Interval
from trl_crisp.preflight.measuring import Effect
from trl_crisp.preflight.verdict import Verdict, judge, recommend


def interval(low: float, estimate: float, high: float) -> Interval:
    return Interval(estimate, low, high, 0.95)


def effect(reduction, agreement=None, accuracy=None) -> Effect:
    return Effect(interval(*reduction), *(None if one is None else interval(*one) for one in (agreement, accuracy)))


SHORTER, SAME = (0.3, 0.4, 0.5), (-0.02, 0.0, 0.02)


@pytest.mark.parametrize(
    ("reduction", "change", "kind"),
    [
        (SHORTER, SAME, "shortens"),
        # A fall within the margin holds, also if its interval reaches beyond it
        (SHORTER, (-0.08, -0.03, 0.02), "shortens"),
        (SHORTER, (-0.08, -0.031, 0.02), "uncertain"),
        (SHORTER, (-0.3, -0.2, -0.03), "uncertain"),
        (SHORTER, (-0.3, -0.2, -0.031), "answers otherwise"),
        (SHORTER, (0.05, 0.1, 0.2), "shortens"),
        # Without a measure only tokens judge
        (SHORTER, None, "shortens"),
        ((-0.1, 0.2, 0.4), SAME, "uncertain"),
        ((0.0, 0.2, 0.4), SAME, "uncertain"),
        ((0.01, 0.05, 0.1), SAME, "shortens"),
        ((0.01, 0.049, 0.1), SAME, "ignores"),
        ((-0.1, 0.01, 0.1), (-0.3, -0.2, -0.1), "ignores"),
        ((-0.1, -0.05, 0.0), SAME, "ignores"),
        ((-0.2, -0.1, -0.01), SAME, "lengthens"),
        ((-0.1, 0.2, 0.4), (-0.3, -0.2, -0.1), "answers otherwise"),
    ],
)
@pytest.mark.parametrize("judged_by", ["accuracy", "agreement"])
def test_the_first_rule_that_applies_decides(reduction, change, kind, judged_by):
    # The other measure says the opposite, and does not count
    other = (-0.9, -0.8, -0.7) if kind != "answers otherwise" else SAME
    changes = {"accuracy": other, "agreement": other, judged_by: change}
    verdict = judge("v1", effect(reduction, changes["agreement"], changes["accuracy"]), judged_by, 0.03, 32, 0.0, 100)
    assert (verdict.kind, verdict.judged_by) == (kind, judged_by)
    assert ("Do not train with it." in verdict.words) == (kind in ("ignores", "lengthens", "answers otherwise"))


def test_the_words_have_the_numbers():
    found = judge("v1", effect((0.331, 0.384, 0.426), (-0.006, 0.012, 0.028)), "agreement", 0.03, 32, 0.0, 100)
    assert found.words == ("v1 shortens by 38% [33%, 43%] at an agreement change of +1.2 points [-0.6, +2.8].")
    found = judge("v2", effect((-0.03, 0.02, 0.07), None, (-0.05, -0.01, 0.03)), "accuracy", 0.03, 32, 0.0, 100)
    assert found.words == (
        "v2: this model ignores the instruction: -2% tokens [-7%, +3%] at an accuracy change of -1.0 points [-5.0, +3.0]; 5% is the least "
        "that counts. Do not train with it."
    )
    found = judge("v3", effect(SHORTER, None, (-0.3, -0.2, -0.1)), "accuracy", 0.025, 32, 0.0, 100)
    assert found.words == (
        "v3: this model answers otherwise under it: -40% tokens [-50%, -30%] at an accuracy change of -20.0 points [-30.0, -10.0]; the margin "
        "allows a fall of 2.5. Do not train with it."
    )
    found = judge("v4", effect(SHORTER), None, 0.03, 32, 0.0, 100)
    assert found.words == "v4 shortens by 40% [30%, 50%]. Whether its answers hold could not be measured."
    found = judge("v5", effect((-0.3, -0.2, -0.1)), None, 0.03, 32, 0.0, 100)
    assert found.words == "v5: answers get longer under it, +20% tokens [+10%, +30%]. Do not train with it."
    found = judge("v1", effect(SHORTER, (-0.2, -0.1, 0.1)), "agreement", 0.03, 32, 0.0, 100)
    assert found.words == (
        "v1 shortens by 40% [30%, 50%] at an agreement change of -10.0 points [-20.0, +10.0]; the margin allows a fall of 3, so its answers may not "
        "hold. Ask more prompts (--prompts 128 halves the interval)."
    )
    found = judge("v1", effect((-0.001, 0.2, 0.4), (-0.0001, -0.0001, 0.0)), "agreement", 0.03, 32, 0.0, 100)
    assert found.words == (
        "v1 shortens by 20% [0%, 40%] at an agreement change of +0.0 points [+0.0, +0.0]; the interval reaches 0, so it may not. Ask more "
        "prompts (--prompts 128 halves the interval)."
    )


def test_an_interval_beyond_the_margin_says_how_many_prompts_would_settle_it():
    found = judge("v1", effect(SHORTER, (-0.06, 0.0, 0.06)), "agreement", 0.03, 32, 0.0, 100)
    # Half the width needs four times the prompts
    assert found.words.endswith(
        "32 prompts cannot exclude a larger fall than the margin of 3.0 points; about 128 would."
    )
    found = judge("v1", effect(SHORTER, (-0.1, -0.029, 0.05)), "agreement", 0.03, 32, 0.0, 100)
    assert found.words.endswith("32 prompts cannot exclude a larger fall than the margin of 3.0 points.")


@pytest.mark.parametrize(("truncated", "warns"), [(0.1, False), (0.25, True)])
def test_cut_answers_are_said_to_favour_short_ones(truncated, warns):
    found = judge("v1", effect(SHORTER, SAME), "agreement", 0.03, 32, truncated, 100)
    assert found.kind == "shortens"
    assert ("But 25% of the plain answers were cut" in found.words) == warns


def test_a_cap_that_cuts_many_plain_answers_hides_whether_the_instruction_is_ignored():
    nothing = effect((0.0, 0.0, 0.0), SAME)
    assert judge("v1", nothing, "agreement", 0.03, 32, 0.1, 1000).kind == "ignores"
    found = judge("v1", nothing, "agreement", 0.03, 32, 0.25, 1000)
    assert found.kind == "uncertain"
    assert found.words == (
        "v1: +0% tokens [+0%, +0%] at an agreement change of +0.0 points [-2.0, +2.0], but 25% of the plain answers were cut at 1,000 tokens, "
        "which hides how much shorter answers get under it. Raise --max_completion_length."
    )
    # Answers that get longer under the cap are longer without it
    assert judge("v1", effect((-0.2, -0.1, -0.01), SAME), "agreement", 0.03, 32, 1.0, 1000).kind == "lengthens"


def verdicts(*kinds: str, judged_by="agreement") -> list[Verdict]:
    return [Verdict(kind, judged_by, "") for kind in kinds]  # type: ignore[arg-type]


def recommended(kinds, lengths, changes=None, judged_by="agreement", truncated=0.0):
    names = ["v1", "v2", "v3"][: len(kinds)]
    effects = [effect(SHORTER, (-0.1, change, 0.1)) for change in changes or [0.0] * len(kinds)]
    return recommend(names, verdicts(*kinds, judged_by=judged_by), lengths, effects, truncated)


def test_the_shortest_that_holds_is_recommended():
    found = recommended(["shortens", "shortens", "answers otherwise"], [60.0, 50.0, 10.0])
    assert found.instruction == "v2"
    assert found.words == "Train with v2: of 3 instructions the shortest whose answers hold."
    assert recommended(["shortens"], [60.0]).words == "Train with v1."


def test_of_equally_short_ones_the_better_change_wins_and_then_the_first():
    found = recommended(["shortens", "shortens", "shortens"], [50.0, 51.0, 51.1], [-0.01, 0.02, 0.05])
    assert found.instruction == "v2"
    assert found.words == "Train with v2: of 3 instructions the shortest whose answers hold (v1 is as short)."
    assert recommended(["shortens", "shortens"], [51.0, 50.0], [0.01, 0.01]).instruction == "v1"
    # By tokens alone the changes do not count
    found = recommended(["shortens", "shortens"], [51.0, 50.0], [0.0, 0.1], judged_by=None)
    assert found.instruction == "v1"
    assert "by its tokens alone: whether the answers hold could not be measured" in found.words
    assert "whose answers hold" not in found.words


def test_without_one_that_holds_the_words_are_not_to_train():
    found = recommended(["ignores", "lengthens", "answers otherwise"], [50.0, 60.0, 10.0])
    assert found.instruction is None
    assert found.words.startswith("Do not train: under none of these instructions")
    found = recommended(["ignores", "uncertain"], [50.0, 60.0])
    assert found.instruction is None
    assert "ask more prompts (--prompts)" in found.words
    found = recommended(["uncertain", "lengthens"], [50.0, 60.0], truncated=0.25)
    assert found.instruction is None
    assert found.words == "No instruction can be recommended yet: raise --max_completion_length, or do not train."
