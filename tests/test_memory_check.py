"""The computed memory of an update against measured peaks: the committed ones, and one here."""

import json

import pytest
from transformers import AutoConfig

from benchmarks.environment import REPOSITORY
from benchmarks.memory_check import (
    CHECKS,
    LARGER_MODEL_TOKENS,
    LEAST,
    MOST,
    RESULT,
    SMALL,
    Check,
    estimate,
    measure,
    table_of,
)
from benchmarks.steps import Case, save_model

RECORD = json.loads(RESULT.read_text(encoding="utf-8"))
README = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_all_checks_are_there():
    found = {(case["name"], Check(**case["check"])) for case in RECORD["cases"]}
    names = ("random Qwen3", "SmolLM2-135M-Instruct")
    assert found == {
        (name, check)
        for name in names
        for check in CHECKS
        if name == names[0] or check.completion_tokens <= LARGER_MODEL_TOKENS
    }


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda case: f"{case['name']}-{tuple(case['check'].values())}")
def test_the_computed_memory_is_within_the_limits_of_the_measured(case):
    config = AutoConfig.for_model(**case["config"])
    computed_mib = estimate(config, Check(**case["check"]), case["prompt_tokens"])
    assert computed_mib == pytest.approx(case["computed_mib"], rel=1e-9)
    assert LEAST <= computed_mib / case["measured_mib"] <= MOST


def test_a_run_here_is_within_the_limits(tmp_path):
    model = save_model(Case("cpu", {**SMALL, "num_hidden_layers": 4}, 1, 1), tmp_path)
    check = Check(lora=False, completion_tokens=128)
    measured_mib, prompt_tokens = measure(model, check)
    computed_mib = estimate(AutoConfig.from_pretrained(model), check, prompt_tokens)
    assert LEAST <= computed_mib / measured_mib <= MOST


def test_the_table_is_the_committed_one():
    opening, closing = "<!-- memory:checked -->", "<!-- /memory:checked -->"
    assert README.split(opening)[1].split(closing)[0].strip() == table_of(RECORD)
    assert f"from {1 - LEAST:.0%} below to {MOST - 1:.0%} above the measured peak" in " ".join(README.split())
