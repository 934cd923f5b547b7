"""The vLLM engine, for real on the CPU: `bash tests/run_vllm.sh` makes its environment and runs these tests."""

import json
import random
from functools import lru_cache
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.lab.task import draw_problem, lab_tokenizer, prompt
from tests.tiny_models import save_tiny, tiny_tokenizer
from trl_crisp.evaluation.engines import TransformersEngine, VllmEngine
from trl_crisp.evaluation.evaluating import evaluate
from trl_crisp.evaluation.settings import EvaluationSettings

pytestmark = pytest.mark.vllm

BASE = Path("benchmarks/lab/fixtures/tradeoff")
# A trained model, whose answers end by themselves and differ from prompt to prompt
SAMPLING = {"max_new_tokens": 340, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 3, "batch_size": 8}
GREEDY = {**SAMPLING, "temperature": 0.0}


@pytest.fixture(scope="module")
def engine():
    return VllmEngine(str(BASE), lab_tokenizer(), max_model_tokens=400, batch_size=8)


def transformers_engine(path: str | Path = BASE) -> TransformersEngine:
    return TransformersEngine(AutoModelForCausalLM.from_pretrained(path).eval(), lab_tokenizer())


@lru_cache
def prompts(count: int = 12) -> list[list[int]]:
    rng = random.Random(11)
    messages = [prompt(draw_problem(rng, 2 + i % 6)) for i in range(count)]
    return lab_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def generate(engine, ids, places=None, **sampling):
    completions, notes = {}, []
    engine.generate(
        ids,
        list(range(len(ids))) if places is None else places,
        lambda index, completion: completions.update({index: completion}),
        lambda done, note: notes.append((done, note)),
        **sampling,
    )
    assert notes[-1][0] == len(ids)
    assert "tokens/s" in notes[-1][1]
    assert "left" in notes[-1][1] or engine.name == "transformers"
    return [completions[index] for index in range(len(ids))]


def test_greedy_tokens_are_those_of_transformers(engine):
    ours = generate(engine, prompts(), **GREEDY)
    assert ours == generate(transformers_engine(), prompts(), **GREEDY)
    ended = [completion.token_ids[-1] for completion in ours if completion.ended_by_eos]
    assert ended == [3] * len(ended)
    assert len(ended) > 6
    assert len({tuple(completion.token_ids) for completion in ours}) == len(ours)


def test_cut_answers_are_those_of_transformers(engine):
    cut = {**GREEDY, "max_new_tokens": 9}
    ours = generate(engine, prompts(), **cut)
    assert ours == generate(transformers_engine(), prompts(), **cut)
    assert not any(completion.ended_by_eos for completion in ours)
    assert {len(completion.token_ids) for completion in ours} == {9}


def test_an_answer_depends_on_the_seed_and_its_place_alone(engine):
    whole = generate(engine, prompts(), **SAMPLING)
    assert whole == generate(engine, prompts(), **SAMPLING)
    part = generate(engine, prompts()[5:], places=list(range(5, 12)), **SAMPLING)
    assert part == whole[5:]
    assert whole != generate(engine, prompts(), **{**SAMPLING, "seed": 4})
    same = generate(engine, [prompts()[0]] * 6, **SAMPLING)
    assert len({tuple(completion.token_ids) for completion in same}) > 1


def test_every_id_of_the_models_own_eos_set_ends_an_answer(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    semicolon = lab_tokenizer().convert_tokens_to_ids(";")
    model.generation_config = GenerationConfig(eos_token_id=[3, semicolon], pad_token_id=0)
    model.save_pretrained(tmp_path)
    engine = VllmEngine(str(tmp_path), lab_tokenizer(), max_model_tokens=400, batch_size=8)
    ours = generate(engine, prompts(), **GREEDY)
    assert ours == generate(transformers_engine(tmp_path), prompts(), **GREEDY)
    assert {completion.token_ids[-1] for completion in ours} == {semicolon}


def test_evaluation_goes_on_with_what_is_missing_and_takes_an_adapter(tmp_path):
    # The CPU kernels of vLLM have no attention heads of 16
    save_tiny(tmp_path / "model", "qwen3", head_dim=64)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer("qwen3").save_pretrained(tmp_path / "adapter")
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluationSettings(
        model=str(tmp_path / "adapter"),
        benchmark=str(tmp_path / "own.jsonl"),
        samples=2,
        max_new_tokens=24,
        engine="vllm",
    )
    whole = evaluate(settings, tmp_path / "whole")
    assert whole["protocol"]["engine"] == "vllm"
    assert whole["protocol"]["dtype"] == "float32"
    assert {"vllm", "torch", "math-verify"} < set(whole["protocol"]["versions"])
    lines = (tmp_path / "whole" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    assert evaluate(settings, tmp_path / "part")["problems"] == whole["problems"]
    with pytest.raises(ValueError, match=r"engine: 'vllm' there, 'transformers' now"):
        evaluate(
            EvaluationSettings(**{**settings.__dict__, "engine": "transformers"}),
            tmp_path / "part",
        )


def test_weights_that_are_not_in_the_files_are_named(tmp_path):
    save_tiny(tmp_path / "model", "qwen3", head_dim=64)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    (tmp_path / "own.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    settings = EvaluationSettings(
        model=str(tmp_path / "model"), benchmark=str(tmp_path / "own.jsonl"), max_new_tokens=24, engine="vllm"
    )
    with pytest.raises(ValueError, match=r"not in the files: model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate(settings, tmp_path / "out")
