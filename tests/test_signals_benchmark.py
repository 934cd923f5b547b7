"""The benchmark of what the signals add to a step, and that the guide shows what was measured."""

import json

import pytest

from benchmarks import signals, steps
from benchmarks.environment import REPOSITORY
from benchmarks.signals import COMPLETION_TOKENS, PARTS, RESULT, ROLLOUTS, shares_of, table_of

GUIDE = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")


def test_the_guide_shows_the_committed_measurements():
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert list(record["cases"]) == [str(tokens) for tokens in COMPLETION_TOKENS]
    assert table_of(record) in GUIDE
    for case in record["cases"].values():
        assert len(case["steps"]) == record["protocol"]["measured_steps"]
        assert case["shares"] == shares_of(case["steps"])
        # What is promised
        assert case["shares"]["all"] < 0.01
    assert f"4 rollouts, medians of {record['protocol']['measured_steps']} steps" in " ".join(GUIDE.split())
    assert record["protocol"]["rollouts_a_step"] == ROLLOUTS == 4


def test_shares_are_medians_over_steps():
    parts = {"texts_s": 1.0, "top tokens_s": 2.0, "verdict_s": 3.0}
    found = shares_of([{**parts, "training_half_s": half} for half in (10.0, 100.0, 20.0)])
    assert found == {
        "texts": pytest.approx(0.05),
        "top tokens": pytest.approx(0.1),
        "verdict": pytest.approx(0.15),
        "all": pytest.approx(0.3),
    }


@pytest.mark.filterwarnings("ignore:teacher_sync_steps=", "ignore:The global batch is")
def test_each_part_of_each_step_is_timed(tmp_path):
    model = steps.save_model(steps.Case("cpu", steps.TINY, ROLLOUTS, 6), tmp_path)
    found = signals.train(model, 6, 2)
    assert len(found) == 2
    for one in found:
        assert one.keys() == {*(f"{part}_s" for part in PARTS), "training_half_s"}
        assert all(0 < value < one["training_half_s"] for name, value in one.items() if name != "training_half_s")
