"""Trainers on tiny models, and batches of made-up rollouts."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset

from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp import CRISPConfig, CRISPTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    """Return a program of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows(count: int = 8, opening: str = "") -> Dataset:
    """Return conversational rows with prompts of different lengths."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{opening}What is {'9' * (1 + i % 5)} + {i}?"}]}
            for i in range(count)
        ]
    )


def config(output_dir, **overrides) -> CRISPConfig:
    """Return a config whose steps take a fraction of a second."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "instruction": "v1",
    }
    return CRISPConfig(str(output_dir), **{**defaults, **overrides})


def make_trainer(
    output_dir,
    kind: str = "llama",
    model=None,
    dataset=None,
    eval_dataset=None,
    peft_config=None,
    callbacks=None,
    **overrides,
):
    """Return a CRISPTrainer on a tiny model."""
    return CRISPTrainer(
        model=tiny_model(kind) if model is None else model,
        args=config(output_dir, **overrides),
        train_dataset=rows() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(kind),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def made_up_rollouts(vocab_size: int, lengths: list[int], masked: dict[int, list[int]] | None = None, seed: int = 0):
    """
    Return a micro-batch as the trainer's `_prepare_inputs` does, and the same as lists without padding.

    Args:
        vocab_size: Ids are drawn below it.
        lengths: Tokens of each completion.
        masked: For a row, the completion positions that a tool wrote.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocab_size, (count,), generator=generator).tolist()

    students = [draw(3 + i % 3) for i in range(len(lengths))]
    teachers = [draw(6 + i % 4) for i in range(len(lengths))]
    completions = [draw(length) for length in lengths]
    tool_masks = [[0 if t in (masked or {}).get(i, []) else 1 for t in range(n)] for i, n in enumerate(lengths)]

    def pad(sequences: list[list[int]], side: str, value: int) -> torch.Tensor:
        width = max(len(s) for s in sequences)
        fill = [[value] * (width - len(s)) for s in sequences]
        return torch.tensor([f + s if side == "left" else s + f for s, f in zip(sequences, fill, strict=True)])

    ones = [[[1] * len(s) for s in group] for group in (students, teachers, completions)]
    batch = {
        "prompt_ids": pad(students, "left", 0),
        "prompt_mask": pad(ones[0], "left", 0),
        "teacher_prompt_ids": pad(teachers, "left", 0),
        "teacher_prompt_mask": pad(ones[1], "left", 0),
        "completion_ids": pad(completions, "right", 0),
        "completion_mask": pad(ones[2], "right", 0),
        "tool_mask": pad(tool_masks, "right", 1),
    }
    plain = {"students": students, "teachers": teachers, "completions": completions, "masks": tool_masks}
    return batch, plain


def parameters_of(model) -> dict[str, torch.Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
