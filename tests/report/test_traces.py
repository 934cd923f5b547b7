import pytest

from tests.report.made_results import write_evaluation
from trl_crisp.report.sources import load_compared
from trl_crisp.report.traces import choose_pairs


def pairs_of(tmp_path, before, after, most=60):
    """`before` and `after`: for each problem the (tokens, is right) of its samples."""
    size = {"problems": len(before), "samples": len(before[0])}
    paths = [
        write_evaluation(tmp_path / name, lambda i, j, side=side: side[i][j], weights=name, **size)
        for name, side in (("before", before), ("after", after))
    ]
    compared = load_compared(paths)
    return choose_pairs(compared.base.problems, compared.all[1].problems, compared.budget_tokens, most)


R, W = True, False
BEFORE = [
    [(100, R), (100, R)],  # 0: most shortened
    [(100, R), (100, R)],  # 1: shortened less
    [(100, R), (100, R)],  # 2: newly wrong
    [(300, W), (100, W)],  # 3: newly right; longer than 4, so the hardest
    [(100, W), (100, W)],  # 4: stays wrong
    [(100, R), (100, R)],  # 5: right and longer
]
AFTER = [
    [(20, R), (20, R)],
    [(90, R), (90, R)],
    [(90, W), (90, W)],
    [(90, R), (90, W)],
    [(10, W), (10, W)],
    [(200, R), (200, R)],
]


def test_each_problem_has_its_kinds(tmp_path):
    kinds = [pair.kinds for pair in pairs_of(tmp_path, BEFORE, AFTER)]
    assert kinds == [("shortened",), ("shortened",), ("newly wrong",), ("newly right", "hardest"), ("hardest",), ()]


def test_the_first_of_each_kind_come_in_turn_and_each_problem_once(tmp_path):
    pairs = pairs_of(tmp_path, BEFORE, AFTER)
    shown = sorted((pair.number, pair.id) for pair in pairs if pair.number is not None)
    assert [name for _, name in shown] == [f"problem/{i}" for i in (0, 2, 3, 4, 1)]
    assert [number for number, _ in shown] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("most", [1, 3, 60])
def test_at_most_so_many_are_shown_in_full(tmp_path, most):
    pairs = pairs_of(tmp_path, BEFORE * 20, AFTER * 20, most)
    assert len(pairs) == 120
    assert sum(pair.number is not None for pair in pairs) == most


def test_the_shown_sample_is_as_right_as_the_problem_and_of_median_length(tmp_path):
    before = [[(10, R), (500, R), (50, R), (60, W)]]
    after = [[(10, W), (20, W), (30, W), (15, R)]]
    [pair] = pairs_of(tmp_path, before, after)
    assert (pair.before.shown_sample, pair.after.shown_sample) == (2, 1)
    assert (pair.before.pass_rate, pair.before.mean_tokens) == (0.75, 155)
    assert pair.reduction == pytest.approx(1 - 18.75 / 155)
