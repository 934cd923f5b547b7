"""The benchmark of ragged rollouts: what it draws, how it takes turns, and its committed result."""

import json
from pathlib import Path

import pytest

from benchmarks.ragged import BATCH, CAP_TOKENS, draw_lengths, order_of_steps, summarise

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "speed" / "ragged.json"


def test_lengths_are_log_normal_and_cut():
    lengths = draw_lengths(draws=500, seed=0)
    assert lengths.shape == (500, BATCH)
    assert lengths.min() >= 1
    assert lengths.max() == CAP_TOKENS
    assert 180 < lengths.mean() < 200
    assert (BATCH * lengths.max(axis=1) / lengths.sum(axis=1)).mean() == pytest.approx(2.71, rel=0.02)


def test_each_draw_is_taken_by_both_splits_in_turns():
    assert order_of_steps(3) == [(0, "trl"), (0, "sorted"), (1, "sorted"), (1, "trl"), (2, "trl"), (2, "sorted")]


def test_quantiles_and_ratios_by_hand():
    parts = {f"{name}_s": 1.0 for name in ("teacher", "student_forward", "backward", "optimizer")}
    rows = [
        {
            "split": split,
            "training_half_s": s,
            "step_cpu_s": 2 * s,
            "limit_share": 0.5,
            "computed_to_real_tokens": s,
            **parts,
        }
        for split, seconds in (("trl", (10.0, 20.0, 30.0)), ("sorted", (4.0, 6.0, 8.0)))
        for s in seconds
    ]
    table = summarise(rows)
    assert table["trl"]["training_half_s"] == pytest.approx({"p20": 14.0, "p50": 20.0, "p80": 26.0})
    assert table["sorted"]["mean_computed_to_real_tokens"] == 6.0
    assert table["ratio_sorted_to_trl"] == pytest.approx({"training_half_s": 0.3, "step_cpu_s": 0.3})


def test_the_committed_result_meets_its_target():
    """As a ratio in one run: at most 1.05 tokens computed per real one, at most half of the training half's time."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["protocol"]["draws"] == 20
    assert len(result["measurements"]) == 40
    assert result["table"] == summarise(result["measurements"])
    assert result["table"]["sorted"]["mean_computed_to_real_tokens"] <= 1.05
    assert result["table"]["ratio_sorted_to_trl"]["training_half_s"] <= 0.5


def test_the_committed_numbers_are_in_the_readme():
    table = json.loads(RESULT.read_text(encoding="utf-8"))["table"]
    text = (RESULT.parents[2] / "README.md").read_text(encoding="utf-8")
    theirs, mine = table["trl"], table["sorted"]
    tokens = [one["mean_computed_to_real_tokens"] for one in (theirs, mine)]
    assert f"| tokens computed per real token, mean | {tokens[0]:.2f} | {tokens[1]:.2f} | |" in text
    for name, key in (("seconds of the training half", "training_half_s"), ("CPU seconds of the step", "step_cpu_s")):
        before, after = theirs[key]["p50"], mine[key]["p50"]
        assert f"| {name}, median | {before:.1f} | {after:.1f} | {after / before:.3f} |" in text
