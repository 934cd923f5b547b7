"""A preflight with vLLM's engine, for real on the CPU: see tests/evaluation/test_vllm.py."""

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.lab.task import draw_problem, lab_tokenizer, prompt
from trl_crisp.preflight.running import run_preflight
from trl_crisp.preflight.settings import PreflightSettings

pytestmark = pytest.mark.vllm

BASE = Path("benchmarks/lab/fixtures/tradeoff")


def test_vllm_samples_and_transformers_computes_the_reverse_kl(tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    lab_tokenizer().save_pretrained(tmp_path / "model")
    rng = random.Random(1)
    problems = [draw_problem(rng, 2 + i % 2) for i in range(12)]
    rows = [{"prompt": prompt(problem), "answer": str(sum(problem))} for problem in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer_of(text: str) -> str | None:
        return text.partition("so answer ")[2].replace(" ", "") or None

    found = {}
    for engine in ("vllm", "transformers"):
        settings = PreflightSettings(
            str(tmp_path / "model"),
            str(tmp_path / "rows.jsonl"),
            ("be concise",),
            12,
            2,
            max_completion_length=340,
            engine=engine,
        )
        found[engine] = run_preflight(settings, tmp_path / engine, answer_of=answer_of)
    vllm = found["vllm"]
    assert vllm["protocol"]["engine"] == "vllm"
    [concise] = vllm["instructions"]
    assert concise["verdict"]["kind"] == "shortens"
    assert vllm["reverse_kl_reason"] is None
    # The same distributions, on other answers
    other = found["transformers"]["instructions"][0]["reverse_kl_nats"]
    assert concise["reverse_kl_nats"] == pytest.approx(other, rel=0.5)
    assert vllm["plain"]["mean_tokens"] == pytest.approx(found["transformers"]["plain"]["mean_tokens"], rel=0.2)
