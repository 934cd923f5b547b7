"""The figure of a run's lengths."""

import subprocess
import sys
from pathlib import Path

import pytest

from trl_crisp.report.figures import completion_length_figure, refresh_steps


def history() -> list[dict[str, float]]:
    refreshes = [0, 0, 1, 1, 1, 2]
    rows = [
        {"step": i + 1, "completions/mean_length": 90.0 - i, "teacher/refreshes": count, "loss": 0.1}
        for i, count in enumerate(refreshes)
    ]
    return [*rows, {"step": 6, "train_runtime": 1.0}]


def test_refreshes_are_where_their_count_grows() -> None:
    assert refresh_steps(history()) == [3, 6]
    assert refresh_steps([{"step": 1, "loss": 0.0}]) == []


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_written(tmp_path: Path, ending: str) -> None:
    path = completion_length_figure(history(), tmp_path / "new" / f"length.{ending}")
    assert path.stat().st_size > 5_000
    assert path.read_bytes().startswith(b"\x89PNG") == (ending == "png")


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None of the 1 log entries"):
        completion_length_figure([{"step": 1, "loss": 0.1}], tmp_path / "length.png")


def test_report_and_metrics_import_no_torch() -> None:
    code = "import sys, trl_crisp.report.figures, trl_crisp.evaluation.metrics as m; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
