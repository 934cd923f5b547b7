import pytest

from trl_crisp.report.run_log import RunLog
from trl_crisp.report.run_verdict import judge_run
from trl_crisp.report.verdict import Measured, judge

UNHEALTHY = "The signals of the training run were unhealthy at its end."


def interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high}


SHORTER = interval(0.40, 0.35, 0.45)
KEPT = interval(0.0, -0.01, 0.01)
ZERO = interval(0.0, 0.0, 0.0)


def measured(**changed):
    values = {"reduction": SHORTER, "accuracy": KEPT, "problems": 100, **changed}
    return Measured(**values)


@pytest.mark.parametrize(
    ("changed", "level", "headline"),
    [
        ({}, "use", "40% fewer tokens [35%, 45%], accuracy kept: 0.0 points [-1.0, +1.0]"),
        (
            {"accuracy": interval(0.05, 0.02, 0.08)},
            "use",
            "40% fewer tokens [35%, 45%], accuracy rose: +5.0 points [+2.0, +8.0]",
        ),
        # A drop of exactly the margin is not a larger one, also after rounding
        ({"accuracy": interval(0.0, 0.67 - 0.70, 0.02)}, "use", None),
        (
            {"accuracy": interval(-0.169, -0.21, -0.12)},
            "do not use",
            "Do not use this checkpoint: 40% fewer tokens [35%, 45%], accuracy fell: -16.9 points [-21.0, -12.0]",
        ),
        # More than the margin, but by chance perhaps
        ({"accuracy": interval(-0.05, -0.11, 0.01)}, "caution", None),
        # Certain, but within the margin
        (
            {"accuracy": interval(-0.02, -0.029, -0.011)},
            "caution",
            "Use with caution: 40% fewer tokens [35%, 45%], accuracy fell: -2.0 points [-2.9, -1.1]",
        ),
        (
            {"accuracy": interval(0.0, -0.04, 0.04)},
            "caution",
            "Use with caution: 40% fewer tokens [35%, 45%], accuracy unclear: 0.0 points [-4.0, +4.0]",
        ),
        (
            {"reduction": interval(-0.30, -0.40, -0.20)},
            "do not use",
            "Do not use this checkpoint: 30% more tokens [20%, 40%], accuracy kept: 0.0 points [-1.0, +1.0]",
        ),
        (
            {"reduction": interval(0.02, -0.03, 0.07)},
            "caution",
            "Use with caution: tokens -2% [-7%, +3%], accuracy kept: 0.0 points [-1.0, +1.0]",
        ),
        ({"repeats_shares": (0.1, 0.5)}, "do not use", None),
        # As many repeat as before
        ({"repeats_shares": (0.5, 0.6)}, "use", None),
        ({"cut_shares": (0.11, 0.0)}, "caution", None),
        ({"cut_shares": (0.0, 0.11)}, "caution", None),
        ({"cut_shares": (0.1, 0.1)}, "use", None),
        ({"unread_shares": (0.51, 0.2)}, "no verdict", "No verdict: most answers could not be read"),
        # Also if accuracy has fallen: it rests on a minority
        (
            {"unread_shares": (0.1, 0.9), "accuracy": interval(-0.8, -0.9, -0.7)},
            "no verdict",
            "No verdict: most answers could not be read",
        ),
        ({"unread": interval(0.06, 0.01, 0.11), "unread_shares": (0.1, 0.16)}, "caution", None),
        ({"unread": interval(0.06, -0.01, 0.13), "unread_shares": (0.1, 0.16)}, "use", None),
        ({"groups": {"level 5": interval(-0.10, -0.16, -0.031)}}, "caution", None),
        ({"groups": {"level 5": interval(-0.10, -0.20, -0.03), "level 1": None}}, "use", None),
        ({"reduction": None, "accuracy": None, "problems": 1}, "no verdict", None),
        # The base solves nothing, or no more than it may lose
        ({"base_level": 0.0, "accuracy": ZERO}, "no verdict", "No verdict: the base solves next to nothing"),
        ({"base_level": 0.03, "accuracy": interval(-0.01, -0.025, 0.0), "problems": 500}, "no verdict", None),
        ({"base_level": 0.031, "accuracy": interval(-0.01, -0.025, 0.0), "problems": 500}, "use", None),
        ({"base_level": 0.0, "accuracy": interval(0.3, 0.2, 0.4)}, "use", None),
        ({"base_level": 0.0, "accuracy": ZERO, "reduction": interval(-0.3, -0.4, -0.2)}, "do not use", None),
        # Two problems, and too few
        (
            {"reduction": interval(0.67, 0.67, 0.67), "accuracy": ZERO, "problems": 2, "base_level": 1.0},
            "caution",
            "Use with caution: 67% fewer tokens [67%, 67%], accuracy unclear: 0.0 points [0.0, 0.0]",
        ),
        ({"problems": 63}, "caution", None),
        ({"problems": 64}, "use", None),
        # No width: 0.97^121 is above 2.5%, and 0.97^122 below it
        ({"accuracy": ZERO, "problems": 121}, "caution", None),
        (
            {"accuracy": ZERO, "problems": 122},
            "use",
            "40% fewer tokens [35%, 45%], accuracy kept: 0.0 points [0.0, 0.0]",
        ),
        ({"accuracy": ZERO, "problems": None}, "caution", None),
    ],
)
def test_the_level_and_the_headline_of_a_measurement(changed, level, headline):
    verdict = judge(measured(**changed))
    assert verdict.level == level
    assert headline is None or verdict.headline == headline
    assert bool(verdict.reasons) == (level != "use")


def test_without_a_baseline_there_is_no_verdict():
    assert judge(None).headline == "No verdict: there is no baseline to compare with"


def test_each_reason_is_told():
    worst = measured(
        accuracy=interval(-0.2, -0.25, -0.15), reduction=interval(-0.3, -0.4, -0.2), repeats_shares=(0.0, 0.8)
    )
    assert judge(worst, unhealthy=UNHEALTHY).reasons == (
        "Accuracy fell by 20.0 points, more than the margin of 3, and the interval is below zero.",
        "Answers are longer than the base's.",
        "Most answers end in repetition: 80%, before 0%.",
        UNHEALTHY,
    )


def test_a_measurement_that_shows_nothing_says_what_to_measure():
    two = measured(accuracy=ZERO, problems=2)
    assert judge(two).reasons == (
        "2 problems are few: measure at least 64.",
        "A loss of up to 84.2 points of accuracy is not excluded. Measure more problems.",
    )
    nothing = measured(accuracy=ZERO, base_level=0.0, cut_shares=(1.0, 0.0))
    assert judge(nothing, unhealthy=UNHEALTHY).reasons == (
        "Accuracy of the base is 0.0%, so it has nothing to lose, and nothing shows that right answers are kept. Measure problems that the base "
        "solves.",
        "Many answers were cut at the budget: 100% before, 0% after. Lengths and accuracy then speak of the cap; raise --max-new-tokens.",
        UNHEALTHY,
    )
    assert judge(measured(accuracy=ZERO, problems=None)).reasons == (
        "Accuracy changed on no problem, and an interval without width shows nothing.",
    )


def test_a_run_of_which_the_base_agreed_with_nothing_has_no_verdict():
    base = {"step": 0, "eval_agreement": 0.02, "eval_agreement_mean_tokens": 100.0}
    assert judge_run(run_of([base, measurement(10, 0.0, 0.01)])).level == "no verdict"


def test_a_run_that_ended_unhealthy_calls_for_caution():
    verdict = judge(measured(), unhealthy=UNHEALTHY)
    assert (verdict.level, verdict.reasons) == (
        "caution",
        (UNHEALTHY,),
    )


def test_a_healthy_best_checkpoint_is_not_held_responsible_for_the_runs_end():
    statuses = [{"step": step, "health/status": status} for step, status in ((5, 2.0), (10, 0.0), (20, 2.0))]
    measurements = [measurement(step, 0.0, 0.01) for step in (5, 10, 20)]
    events = [
        {"step": 5, "status": "unhealthy", "reasons": ["early"]},
        {"step": 20, "status": "unhealthy", "reasons": ["late"]},
    ]
    run = run_of([*measurements, *statuses], best_step=10, events=events)
    assert judge_run(run).level == judge_run(run, 10).level == "use"
    assert judge_run(run, 5).reasons == ("The signals of the training run were unhealthy at step 5.",)
    assert judge_run(run, 20).reasons == (UNHEALTHY,)
    # Without a measurement the signals alone say so
    found = judge_run(run_of(statuses, events=events), 7)
    assert found.headline == "Do not use this checkpoint: the signals of the training were unhealthy at step 7"
    assert found.reasons[0] == "Step 5, unhealthy: early."


def run_of(entries, best_step=None, events=()):
    return RunLog("run", None, entries, 20, 20, best_step, None, list(events))


def measurement(step, change, high, name="eval_agreement", key=None, reduction=0.3):
    key = key or name
    low = change - (high - change)
    return {
        "step": step,
        f"{name}_mean_tokens": 100 * (1 - reduction),
        f"{name}_reduction": reduction,
        f"{key}_change": change,
        f"{key}_change_low": low,
        f"{key}_change_high": high,
    }


def test_a_run_is_judged_by_its_best_checkpoint():
    run = run_of([measurement(10, 0.0, 0.01), measurement(20, -0.4, -0.3)], best_step=10)
    verdict = judge_run(run)
    assert verdict.level == "use"
    assert verdict.headline == ("30% fewer tokens, agreement with the base kept: 0.0 points [-1.0, +1.0]")
    assert verdict.reasons == ("This is step 10, the best checkpoint.",)


def test_a_run_without_a_best_checkpoint_is_judged_by_its_last_measurement():
    verdict = judge_run(run_of([measurement(10, 0.0, 0.01), measurement(20, -0.4, -0.3)]))
    assert verdict.level == "do not use"
    assert verdict.reasons[0] == "This is step 20, the last measured step."
    assert verdict.reasons[-1] == "No measured step was found to be shorter than the base and as good."


def test_accuracy_counts_before_agreement_and_a_benchmark_before_the_monitor():
    agreement = measurement(20, -0.4, -0.3)
    labels = measurement(20, 0.0, 0.01, key="eval_agreement_accuracy")
    benchmark = measurement(20, -0.2, -0.1, name="eval_gsm8k", key="eval_gsm8k_accuracy")
    assert "accuracy on the monitor prompts kept" in judge_run(run_of([agreement | labels])).headline
    assert "accuracy on gsm8k fell: -20.0" in judge_run(run_of([agreement | labels, benchmark])).headline


@pytest.mark.parametrize(("level", "told"), [(0.03, "agreement with the base fell"), (0.04, "accuracy")])
def test_accuracy_that_cannot_fall_by_the_margin_leaves_the_verdict_to_agreement(level, told):
    base = {"step": 0, "eval_agreement": 0.9, "eval_agreement_accuracy": level, "eval_agreement_mean_tokens": 100.0}
    labels = measurement(20, 0.0, 0.01, key="eval_agreement_accuracy")
    assert told in judge_run(run_of([base, measurement(20, -0.4, -0.3) | labels])).headline


@pytest.mark.parametrize(
    ("status", "level", "headline"),
    [
        (0.0, "no verdict", "No verdict: accuracy was not measured; rollouts went from 100 to 60 tokens"),
        (2.0, "do not use", "Do not use this checkpoint: the signals of the training were unhealthy at its end"),
    ],
)
def test_a_run_that_measured_nothing_is_judged_by_its_signals(status, level, headline):
    entries = [{"step": s, "completions/mean_length": n, "health/status": status} for s, n in ((1, 100.0), (20, 60.0))]
    event = {"step": 19, "status": "unhealthy", "reasons": ["most rollouts are empty"]}
    verdict = judge_run(run_of(entries, events=[event] if status else []))
    assert (verdict.level, verdict.headline) == (level, headline)
    if status:
        assert verdict.reasons == (
            "Step 19, unhealthy: most rollouts are empty.",
            "Accuracy was not measured.",
        )
