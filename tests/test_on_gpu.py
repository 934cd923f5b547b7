"""On one GPU: rollouts by vLLM, colocated, and the whole trainer under FSDP2. `bash tests/run_gpu.sh` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.helpers import make_trainer, parameters_of
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
# vLLM's attention has no heads of 16
SHAPE = {"head_dim": 64, "scale": 32.0}


@pytest.mark.parametrize("sleeps", [False, True], ids=["awake", "sleep"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_vllm_samples_from_the_student(tmp_path, tuning, sleeps):
    """In a process of its own each, because vLLM keeps its memory."""
    pytest.importorskip("vllm")
    code = f"from tests.test_on_gpu import train_with_vllm; train_with_vllm({str(tmp_path)!r}, {tuning!r}, {sleeps})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def train_with_vllm(directory: str, tuning: str, sleeps: bool) -> None:
    """Train a few steps; the base stays, and the gap between engine and student is rounding."""
    path = save_tiny(f"{directory}/model", "qwen3", dtype=torch.bfloat16, **SHAPE)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(
        f"{directory}/run",
        "qwen3",
        model=path,
        peft_config=lora if tuning == "lora" else None,
        model_init_kwargs={"dtype": "bfloat16" if tuning == "lora" else "float32"},
        use_cpu=False,
        bf16=True,
        use_vllm=True,
        vllm_max_model_length=512,
        vllm_gpu_memory_utilization=0.2,
        vllm_enable_sleep_mode=sleeps,
        max_prompt_length=400,
        max_completion_length=64,
        temperature=0.7,
        learning_rate=1e-2 if tuning == "lora" else 1e-3,
    )
    before = parameters_of(trainer.model)
    trainer.train()
    gaps = [log["vllm/mean_gap_nats"] for log in trainer.state.log_history if "vllm/mean_gap_nats" in log]
    assert len(gaps) == 3
    assert max(gaps) < 0.1, gaps
    if tuning == "lora":
        moved = [name for name, w in parameters_of(trainer.model).items() if not torch.equal(w, before[name])]
        assert moved
        assert all(".default." in name for name in moved)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_whole_trainer_runs_under_fsdp2(tmp_path, tuning):
    """One process; its losses are those of a run without sharding."""
    path = save_tiny(tmp_path / "model", "qwen3", **SHAPE)
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for launch in ("single", "fsdp2"):
        config = (ROOT / "examples" / "accelerate" / f"{launch}.yaml").read_text()
        (tmp_path / f"{launch}.yaml").write_text(config.replace("num_processes: 8", "num_processes: 1"))
        flags = {
            "config_file": tmp_path / f"{launch}.yaml",
            "model_name_or_path": path,
            "dataset_name": tmp_path / "rows.jsonl",
            "instruction": "general",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 32,
            "max_steps": 3,
            "teacher_sync_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": tmp_path / launch,
        }
        if tuning == "lora":
            flags |= {"use_peft": "true", "lora_target_modules": "all-linear"}
        arguments = [item for name, value in flags.items() for item in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "trl_crisp.cli", "train", *arguments], cwd=ROOT, check=True, timeout=300)
        state = json.loads((tmp_path / launch / "trainer_state.json").read_text())
        losses[launch] = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert len(losses["fsdp2"]) == 3
    # The first rollouts are sampled with the same weights and seed
    assert losses["fsdp2"][0] == pytest.approx(losses["single"][0], rel=0.05)
