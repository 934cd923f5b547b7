"""The distance from the base told to be concise, as each of several processes measures it."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.helpers import make_trainer, rows
from tests.tiny_models import tiny_model
from trl_crisp.health.attach import attach_health
from trl_crisp.health.distance import answer_log_probs


@dataclass
class Distances:
    """In nats: logged by step, and that of made-up answers to the trained student, from copies of both models too."""

    logged: dict[int, float]
    found: float
    expected: float
    # Whether the student's weights are the same after it was measured
    is_restored: bool


def measure(directory: Path) -> Distances:
    """Train two steps, and measure on all processes."""
    model = tiny_model()
    first = copy.deepcopy(model)
    fields = {"monitor_prompts": 8, "monitor_samples": 2, "monitor_steps": 2, "monitor_distance": True}
    trainer = make_trainer(
        directory,
        model=model,
        dataset=rows(24),
        **fields,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
    )
    monitor = attach_health(trainer, lambda text: None).monitor
    assert monitor is not None
    assert monitor._distance is not None
    trainer.train()
    # An odd number of answers for two processes, of different lengths
    answers = [[list(range(65 + i, 70 + 3 * i))] for i in range(7)]
    before = copy.deepcopy(trainer.model)
    found, _ = monitor._distance.measure(range(7), answers)
    is_restored = all(
        torch.equal(own, copied) for own, copied in zip(trainer.model.parameters(), before.parameters(), strict=True)
    )
    flat = [answer for [answer] in answers]
    with trainer.accelerator.autocast():
        student = answer_log_probs(before.eval(), monitor._token_ids[:7], flat, 1.0, 10_000)
    first = first.to(next(before.parameters()).dtype)
    with trainer.accelerator.autocast():
        base = answer_log_probs(first, monitor._distance._teacher_prompts[:7], flat, 1.0, 10_000)
    name = "eval_agreement_distance_nats"
    logged = {log["step"]: log[name] for log in trainer.state.log_history if name in log}
    return Distances(logged, found, float(np.mean(student) - np.mean(base)), is_restored)
