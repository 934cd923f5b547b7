"""Answers along a run by the run's own vLLM, for real on the CPU: see tests/rollouts/test_vllm.py."""

import json
import os
import socket
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

from tests.helpers import make_trainer, rows
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.vllm_on_cpu import let_weights_be_updated
from trl_crisp.evaluation.engines import TransformersEngine
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.attach import attach_health
from trl_crisp.health.measuring import BenchmarkCallback
from trl_crisp.health.run_engine import ServerEngine
from trl_crisp.health.student_answers import sample_student, tokenizer_of

pytestmark = pytest.mark.vllm


def test_the_answers_are_the_students_at_that_step(tmp_path, monkeypatch):
    """Greedy, they are those of transformers with the same weights, before and after a step; and measuring changes no weight."""
    let_weights_be_updated(monkeypatch)
    path = save_tiny(tmp_path / "model", "qwen3", head_dim=64, scale=32.0)
    questions = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    trainer = make_trainer(
        tmp_path / "run",
        "qwen3",
        model=path,
        dataset=rows(24),
        use_vllm=True,
        vllm_max_model_length=512,
        max_prompt_length=400,
        monitor_prompts=8,
        monitor_samples=2,
        monitor_steps=1,
        learning_rate=1e-2,
        max_steps=2,
    )
    settings = EvaluationSettings(model=path, benchmark=str(tmp_path / "own.jsonl"), samples=2, max_new_tokens=12)
    trainer.add_callback(BenchmarkCallback(trainer, settings, every_steps=1))
    health = attach_health(trainer, lambda text: text[:1] or None)
    trainer.train()
    for step in (0, 1, 2):
        results = json.loads((tmp_path / f"run/evaluation/own/step-{step}/results.json").read_text())
        assert results["protocol"]["engine"] == "vllm"
        assert "vllm" in results["protocol"]["versions"]

    greedy = EvaluationSettings(model=path, benchmark="own", samples=1, max_new_tokens=12, temperature=0.0)
    monitor = health.monitor
    engine, samples, _ = sample_student(
        trainer, tokenizer_of(trainer), monitor._problems, monitor._token_ids, greedy, None
    )
    assert engine.name == "vllm"
    found = {}
    TransformersEngine(trainer.model.eval(), tokenizer_of(trainer)).generate(
        monitor._token_ids,
        range(8),
        lambda index, completion: found.update({index: completion.token_ids}),
        lambda *_: None,
        max_new_tokens=12,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=0,
        batch_size=None,
    )
    assert [sample.token_ids for sample in samples] == [found[i] for i in range(8)]


@pytest.fixture
def server(tmp_path):
    """A vLLM server with a tiny model: its address and the model's directory."""
    path = save_tiny(tmp_path / "model", "qwen3", head_dim=64, scale=32.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of a package "vllm", and the build for CPUs has another name
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    options = [
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [*command, *options], env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        yield f"http://127.0.0.1:{port}", path
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_answers_each_prompt_with_its_own_seed(server):
    """Greedy as transformers; sampled, an answer depends on its seed and its place alone."""
    address, path = server
    engine = ServerEngine(VLLMClient(base_url=address, connection_timeout=240), tiny_tokenizer("qwen3"), [2])
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = 2
    prompts = [[10 + i, 20, 30 + i] for i in range(6)]

    def answers(engine, prompts=prompts, places=range(6), **more):
        found = {}
        sampling = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "batch_size": None}
        engine.generate(
            prompts,
            places,
            lambda index, completion: found.update({index: completion}),
            lambda *_: None,
            **{**sampling, **more},
        )
        return [found[i] for i in range(len(prompts))]

    assert answers(engine) == answers(TransformersEngine(model, tiny_tokenizer("qwen3")))
    sampled = answers(engine, temperature=1.0)
    assert sampled == answers(engine, temperature=1.0)
    assert sampled[3:] == answers(engine, prompts[3:], [3, 4, 5], temperature=1.0)
    same = answers(engine, [prompts[0]] * 6, temperature=1.0)
    assert len({tuple(one.token_ids) for one in same}) > 1
