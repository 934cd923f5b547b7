"""The benchmark of false alarms: one real run of a few steps, and the committed runs and their table."""

import json
from pathlib import Path

from benchmarks.health import false_alarms


def test_a_run_is_watched_and_measured(monkeypatch):
    monkeypatch.setattr(
        false_alarms,
        "CONFIG",
        {
            **false_alarms.CONFIG,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "monitor_prompts": 8,
            "monitor_samples": 2,
            "monitor_base_samples": 2,
        },
    )
    monkeypatch.setattr(false_alarms, "TEST_PROBLEMS", 1)
    found = false_alarms.run(0)
    assert found["steps"] == 2
    assert [one["step"] for one in found["measurements"]] == [0, 1, 2]
    assert -1 <= found["measurements"][1]["agreement_change"] <= 1
    assert found["stopped_by_the_guard_at_step"] is None


def test_findings_by_hand():
    def run(changes, stop=None, guard=None):
        return {
            "reason_of_the_stop": stop,
            "stopped_by_the_guard_at_step": guard,
            "test": {
                "before": {"accuracy": 0.9, "mean_tokens": 90.0},
                "after": {"accuracy": 0.95, "mean_tokens": 40.0},
            },
            "measurements": [{"step": 2 * i, "agreement_change": change} for i, change in enumerate([0.0, *changes])],
        }

    runs = [run([0.01, -0.03]), run([-0.031, -0.04], stop="it fell"), run([0.0], guard=3)]
    table = false_alarms.findings({"protocol": {"config": {"monitor_margin": 0.03}}, "runs": runs})
    assert table.splitlines()[-1] == "| 3 | 1 | 1 | 5 | 2 | -4.0 points | 90.0%, 95.0% | 90.0, 40.0 |"


def test_the_committed_runs_are_of_this_protocol_and_in_the_readme():
    results = json.loads(false_alarms.RESULT.read_text(encoding="utf-8"))
    assert [run["seed"] for run in results["runs"]] == list(false_alarms.SEEDS)
    now = false_alarms.protocol()
    assert {key: value for key, value in results["protocol"].items() if key != "environment"} == {
        key: value for key, value in now.items() if key != "environment"
    }
    # Healthy by labels: otherwise a stop would be no false alarm
    for run in results["runs"]:
        assert run["test"]["after"]["accuracy"] >= run["test"]["before"]["accuracy"] - 0.03
    text = Path("benchmarks/README.md").read_text(encoding="utf-8")
    assert false_alarms.with_findings(text, results) == text
    examples = " ".join(Path("examples/README.md").read_text(encoding="utf-8").split())
    count = sum(one["step"] > 0 for run in results["runs"] for one in run["measurements"])
    assert f"Of {len(results['runs'])} healthy runs in the lab, with this rule and {count} measurements" in examples
    assert not any(run["reason_of_the_stop"] or run["stopped_by_the_guard_at_step"] for run in results["runs"])
