"""A real process is killed by a real signal and resumes; what comes out is the uninterrupted run, bit by bit.

All points are tried by benchmarks/resume.py, whose result is committed; here four of them.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.resume import KINDS, TUNINGS, Point, all_points, run_reference, try_point

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "resume.json"


@pytest.mark.parametrize(
    ("tuning", "kind", "point"),
    [
        ("full", "periodic", Point("step", 7)),
        ("lora", "ema", Point("step", 4)),
        ("full", "ema", Point("save", 6, 90)),
        ("lora", "periodic", Point("write", 8)),
    ],
    ids=str,
)
def test_a_run_killed_anywhere_resumes_as_the_uninterrupted_one(tmp_path, tuning, kind, point):
    torch.set_num_threads(1)
    run_reference(tuning, kind, tmp_path / "reference")
    assert try_point(tuning, kind, point, tmp_path / "reference", tmp_path / "run") is None


def test_the_committed_result_is_whole():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["survived"] == result["tried"] == len(all_points()) * len(TUNINGS) * len(KINDS)
    assert all(row["differing"] is None for row in result["points"])
