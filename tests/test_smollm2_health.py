"""The benchmark of the health measures on SmolLM2: the committed runs and their table."""

import json
from pathlib import Path

from benchmarks import smollm2_health


def test_the_committed_runs_are_of_this_protocol_and_in_the_readme():
    results = json.loads(smollm2_health.RESULT.read_text(encoding="utf-8"))
    assert results["protocol"] == json.loads(json.dumps(smollm2_health.protocol()))
    assert [run["seed"] for run in results["runs"]] == list(smollm2_health.SEEDS)
    for run in results["runs"]:
        steps = [entry["step"] for entry in run["log"] if "eval_agreement" in entry]
        assert steps == [0, 3, 7, 11, 15, 16]
    text = Path("benchmarks/README.md").read_text(encoding="utf-8")
    assert smollm2_health.with_table(text, results) == text
