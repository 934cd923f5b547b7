"""The benchmark of a refresh against a step, and that the guide shows what was measured."""

import json

import pytest

from benchmarks import refresh, steps
from benchmarks.environment import REPOSITORY
from benchmarks.refresh import RESULT, SETTINGS, Setting, summarise, table_of

GUIDE = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")


def test_the_guide_shows_the_committed_measurements():
    record = json.loads(RESULT.read_text(encoding="utf-8"))
    assert list(record["cases"]) == list(SETTINGS)
    assert table_of(record) in GUIDE
    for case in record["cases"].values():
        assert len(case["steps"]) == record["protocol"]["measured_steps"]
        assert case["summary"] == summarise(case["steps"])
    shares = [case["summary"]["share"]["p50"] for case in record["cases"].values()]
    full, _, zero3, *lora = shares
    assert (
        f"takes {full:.0%} of one step's training half, {max(lora):.1%} with LoRA and {zero3:.0%} under ZeRO-3"
        in " ".join(GUIDE.split())
    )
    rollouts, tokens = record["protocol"]["rollouts_a_step"], record["protocol"]["completion_tokens"]
    assert (
        f"Medians of {record['protocol']['measured_steps']} steps of {rollouts} rollouts of {tokens} tokens"
        in " ".join(GUIDE.split())
    )


def test_the_share_is_that_of_each_step():
    found = summarise([{"refresh_s": r, "training_half_s": t} for r, t in ((1.0, 10.0), (3.0, 10.0), (2.0, 100.0))])
    assert {name: one["p50"] for name, one in found.items()} == {
        "refresh_s": 2.0,
        "training_half_s": 10.0,
        "share": pytest.approx(0.1),
    }


@pytest.mark.filterwarnings("ignore:teacher_sync_steps=", "ignore:The global batch is")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_each_step_has_a_refresh(tmp_path, lora):
    case = steps.Case("cpu", steps.TINY, 2, 6)
    model = steps.save_model(case, tmp_path)
    found = refresh.train(Setting(lora, zero_stage=0), model, 2, 6, str(tmp_path / "run"))
    assert len(found) == 2
    for one in found:
        assert 0 < one["refresh_s"] < one["training_half_s"]
