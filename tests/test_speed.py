"""benchmarks.speed: everybody computes the same, and the tables are those of the JSON."""

import json

import pytest
import torch

from benchmarks import speed

TINY = speed.Case("cpu", 20, 8, 64)


@pytest.mark.parametrize(
    "case",
    [TINY, TINY._replace(frozen_head=True), TINY._replace(beta=0.5), TINY._replace(beta=0.0)],
    ids=["reverse KL", "frozen head", "JSD", "forward KL"],
)
def test_the_contestants_do_the_same_work(case):
    measured = speed.measure_times(case, rounds=2)
    assert list(measured) == ["crisp", "trl", "trl_slices", "naive", "authors"]
    assert all(len(one["all_seconds"]) == 2 for one in measured.values())
    mine, trl = measured["crisp"], measured["trl"]
    assert trl["gradient_distance_to_crisp"] < 1e-4
    assert trl["crisp_ratio"]["p50"] == mine["seconds"]["p50"] / trl["seconds"]["p50"]
    assert mine["seconds"]["p50"] == pytest.approx(sum(mine["all_seconds"]) / 2)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_contestant_that_computes_something_else_is_an_error(monkeypatch, factor):
    monkeypatch.setitem(speed.CONTESTANTS, "naive", lambda x, case: factor * speed.naive(x, case))
    with pytest.raises(RuntimeError, match="naive computes something else"):
        speed.measure_times(TINY, rounds=1)


def test_the_peak_of_a_pass_leaves_out_what_made_the_inputs(monkeypatch):
    case = TINY._replace(tokens=512, hidden=576, vocabulary=49_152)
    monkeypatch.setattr(speed, "run_once", lambda *_: None)
    # A temporary of a head has 108 MiB
    assert speed.measure_peak_mib("crisp", case) < 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cases_for_a_gpu_are_skipped_with_a_word(monkeypatch, capsys, tmp_path):
    output = tmp_path / "speed.json"
    output.write_text(json.dumps({"cases": {"quick": {"skipped": "kept"}}}))
    monkeypatch.setattr("sys.argv", ["speed", "--cases", "qwen3-8b", "--output", str(output)])
    speed.main()
    assert "| qwen3-8b | skipped: no GPU |" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["cases"]["qwen3-8b"]["skipped"] == "no GPU"
    assert record["cases"]["quick"]["skipped"] == "kept"
    assert record["cases"]["qwen3-8b"]["protocol"]["versions"]["torch"] == torch.__version__


def test_all_cases_are_on_record():
    record = json.loads(speed.RESULT.read_text(encoding="utf-8"))
    assert set(record["cases"]) == set(speed.CASES)
    assert all(case["size"]["device"] in ("cpu", "cuda") for case in record["cases"].values())
