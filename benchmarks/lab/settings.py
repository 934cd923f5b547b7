"""The lab's settings: what each changes in the lab's common values, and which finding it tests."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.lab.task import INSTRUCTION

# Common to all runs. Our choice: with these values 100 steps take three to five minutes on one core.
COMMON: dict[str, Any] = {
    "instruction": INSTRUCTION,
    "per_device_train_batch_size": 24,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-5,
    "max_steps": 100,
    "max_completion_length": 160,
    "teacher_sync_steps": 50,
}

# Where a run computes and what it reports. None of it changes a result, so it is not in the protocol
ON_A_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Setting:
    """
    One row of the table.

    Attributes:
        about: The finding, in a few words.
        overrides: Fields of `CRISPConfig` that differ from [`COMMON`].
        lora_rank: Train a LoRA adapter of this rank instead of the whole model.
        mask_truncated: Leave truncated rollouts out of the loss.
        form: The form of the task.
        curve: Also measure accuracy and length during the run, which takes a third of its time.
        paper: The paper's result: the change of the mean tokens and the accuracy on MATH-500, for Qwen3-8B at step 99, unless
            the text names another quantity. The base model has 4,884 tokens and 95.7.
    """

    about: str
    overrides: dict[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    mask_truncated: bool = False
    form: str = "tradeoff"
    curve: bool = False
    paper: str = ""


def _periodic(steps: int, **overrides: Any) -> dict[str, Any]:
    return {"teacher_sync_steps": steps, **overrides}


SETTINGS: dict[str, Setting] = {
    "untrained": Setting("the base, with and without the instruction", {"max_steps": 0}),
    "frozen": Setting(
        "a teacher that is never refreshed",
        {"teacher_model_kind": "base", "teacher_sync_steps": None},
        paper="-18%, 95.1",
    ),
    "m50": Setting("the paper's M", _periodic(50), curve=True, paper="-57%, 95.7 (v1); -32%, 95.7 (v2)"),
    "m20": Setting("M = 20", _periodic(20), curve=True),
    "m10": Setting("M = 10", _periodic(10), paper="-64%; AIME 2024: 49.6 instead of 76.2"),
    "m5": Setting("M = 5", _periodic(5), curve=True),
    "m1": Setting("M = 1", _periodic(1), curve=True, paper="grows, 60.8: collapse"),
    # Our rate: the average is about as old as the teacher's weights at M = 50. With the package's default of 0.005 the teacher would
    # hardly change in 100 steps
    "ema": Setting(
        "an average instead of refreshes, 2% of the student a step",
        {"teacher_model_kind": "ema", "teacher_sync_steps": None, "teacher_update_rate": 0.02},
    ),
    "jsd": Setting("Jensen-Shannon divergence", _periodic(50, beta=0.5), paper="-33%, 94.8"),
    "forward-kl": Setting("forward KL", _periodic(50, beta=0.0), paper="grows to 29,135 tokens, 5.7: collapse"),
    "token": Setting("TRL's mean over all tokens", _periodic(50, loss_normalization="token")),
    "cap-40": Setting(
        "rollouts of at most 40 tokens",
        _periodic(50, max_completion_length=40),
        paper="cap 1k instead of 8k: -30%, no loss",
    ),
    "cap-80": Setting("rollouts of at most 80 tokens", _periodic(50, max_completion_length=80)),
    "cap-80-masked": Setting(
        "the same, cut rollouts out of the loss", _periodic(50, max_completion_length=80), mask_truncated=True
    ),
    "cap-256": Setting(
        "rollouts of at most 256 tokens",
        _periodic(50, max_completion_length=256),
        paper="cap 30k: -6.5 points on AIME 2024",
    ),
    "temperature-0.6": Setting("rollouts at temperature 0.6", _periodic(50, temperature=0.6)),
    "temperature-1.3": Setting("rollouts at temperature 1.3", _periodic(50, temperature=1.3)),
    "lora-3e-5": Setting("LoRA at the full learning rate", _periodic(50), lora_rank=16),
    "lora-3e-4": Setting("LoRA at 10 times it", _periodic(50, learning_rate=3e-4), lora_rank=16),
    "lora-3e-3": Setting("LoRA at 100 times it", _periodic(50, learning_rate=3e-3), lora_rank=16),
    "long-m20": Setting(
        "M = 20 for 200 steps: where the sweet spot ends",
        _periodic(20, max_steps=200),
        curve=True,
        paper="holds to about 2x compression, then the harder set falls first",
    ),
    "long-frozen": Setting(
        "a frozen teacher for 200 steps",
        {"teacher_model_kind": "base", "teacher_sync_steps": None, "max_steps": 200},
        curve=True,
    ),
    "stability-untrained": Setting("checks are waste: the base", {"max_steps": 0}, form="stability"),
    "stability-frozen": Setting(
        "checks are waste: frozen", {"teacher_model_kind": "base", "teacher_sync_steps": None}, form="stability"
    ),
    "stability-m20": Setting("checks are waste: M = 20", _periodic(20), form="stability"),
    "stability-m1": Setting("checks are waste: M = 1", _periodic(1), form="stability"),
    "short": Setting(
        "checks are waste: 24 steps at 7e-5, no refresh",
        _periodic(50, max_steps=24, learning_rate=7e-5),
        form="stability",
    ),
    "short-m1": Setting(
        "checks are waste: 24 steps at 7e-5, M = 1", _periodic(1, max_steps=24, learning_rate=7e-5), form="stability"
    ),
}
