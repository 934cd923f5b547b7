"""Right answers in rows to train on: the column, the final answer of a solution, and rows without any."""

import pytest

from trl_crisp.evaluation.row_answers import find_labels


@pytest.mark.parametrize(
    ("values", "golds", "kind"),
    [
        ([{"answer": "4"}, {"answer": None}, {"answer": "1/2"}], ["4", None, "1/2"], "math"),
        ([{"answer": 4}, {"answer": 0.5}], ["4", "0.5"], "math"),
        ([{"answer": ""}, {"answer": "  "}, {"answer": "7"}], [None, None, "7"], "math"),
        # GSM8K
        ([{"answer": "Natalia sold 48/2 = 24 clips.\n#### 1,072"}], ["1072"], "math"),
        # TRL's DeepMath and NuminaMath
        ([{"solution": "$\\frac{1}{2}$"}], ["\\frac{1}{2}"], "math"),
        ([{"solution": "We add. " * 60 + "So it is \\boxed{7}."}], ["7"], "math"),
        # The first column with answers counts
        ([{"answer": "1", "solution": "2"}], ["1"], "math"),
        ([{"answer": None, "solution": "2"}], ["2"], "math"),
        # DAPO-Math-17k
        ([{"reward_model": {"ground_truth": "34", "style": "rule"}}], ["34"], "math"),
        ([{"answer": "B"}, {"answer": "c"}], ["B", "c"], "choice"),
        ([{"answer": "Oslo"}, {"answer": ["the Nile", "Nile"]}], ["Oslo", ["the Nile", "Nile"]], "text"),
    ],
)
def test_answers_are_found(values, golds, kind):
    labels = find_labels(values, None)
    assert labels.golds == golds
    assert labels.kind == kind
    assert labels.count == sum(gold is not None for gold in golds)
    assert labels.column is not None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([{"question": "x"}], "the rows have no answer, solution or reward_model.ground_truth"),
        ([{"answer": None}], "the rows have no answer, solution or reward_model.ground_truth"),
        ([{"answer": {"value": 1}}], "column 'answer' has no final answers: its answer is {'value': 1}"),
        (
            [{"solution": "We add the two numbers. " * 20}],
            "column 'solution' has solutions without a marked final answer",
        ),
        ([{"reward_model": "rule"}], "the rows have no answer"),
    ],
)
@pytest.mark.parametrize("asked", [None, "choice"])
def test_rows_without_answers_are_no_error(values, reason, asked):
    labels = find_labels(values, asked)
    assert (labels.column, labels.golds, labels.count) == (None, [None], 0)
    assert labels.kind == (asked or "math")
    assert reason in labels.reason


def test_a_column_that_cannot_be_used_leaves_the_next_one():
    labels = find_labels([{"answer": {"value": 1}, "solution": "5"}], None)
    assert (labels.column, labels.golds) == ("solution", ["5"])


def test_a_kind_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"column 'answer'.*row 0: the answer '12' is not a letter"):
        find_labels([{"answer": "12"}], "choice")
    assert find_labels([{"answer": "12"}], "text").kind == "text"


def test_with_a_function_of_the_users_any_right_answer_fits():
    labels = find_labels([{"answer": ["1", "2"]}, {"answer": "(1, 2)"}], None, has_answer_of=True)
    assert (labels.golds, labels.kind) == ([["1", "2"], "(1, 2)"], "text")
    assert labels.reason == "answer_of finds them, and two are the same if they are equal"
    with pytest.raises(ValueError, match="only texts can have several right answers"):
        find_labels([{"answer": ["1", "2"]}], None)
