"""Rollouts by vLLM, for real on the CPU: a LoRA student is pushed, and the engine samples from it. `bash tests/run_vllm.sh` runs it."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers import make_trainer, parameters_of
from tests.tiny_models import save_tiny
from tests.vllm_on_cpu import let_weights_be_updated

pytestmark = pytest.mark.vllm


def test_the_engine_samples_from_the_student_that_was_pushed_last(tmp_path, monkeypatch):
    """And a run whose updates no longer reach it stops."""
    let_weights_be_updated(monkeypatch)
    # The CPU kernels of vLLM have no attention heads of 16. The engine takes the dtype of the files, and the student the same
    path = save_tiny(tmp_path / "model", "qwen3", head_dim=64, scale=32.0, dtype=torch.bfloat16)
    trainer = make_trainer(
        tmp_path / "run",
        "qwen3",
        model=path,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        model_init_kwargs={"dtype": "bfloat16"},
        use_vllm=True,
        vllm_max_model_length=512,
        max_prompt_length=400,
        max_completion_length=32,
        temperature=0.7,
        top_p=0.95,
        learning_rate=2e-2,
    )
    before = parameters_of(trainer.model)
    trainer.train()
    gaps = [log["vllm/mean_gap_nats"] for log in trainer.state.log_history if "vllm/mean_gap_nats" in log]
    assert len(gaps) == 3
    assert 0 < max(gaps) < 0.1
    moved = [name for name, weight in parameters_of(trainer.model).items() if not torch.equal(weight, before[name])]
    assert moved
    assert all(".default." in name for name in moved)

    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(-4)
    with pytest.raises(RuntimeError, match=r"vLLM does not sample from the student.*stale weights"):
        trainer.train()
