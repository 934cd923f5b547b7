"""One run of the lab: trains one setting with one seed, and measures it with and without the instruction."""

import argparse
import importlib.metadata
import math
import platform
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from benchmarks.lab.protocol import CURVE_PROBLEMS, FINAL_PROBLEMS, FIXTURES, protocol_of
from benchmarks.lab.settings import ON_A_CPU, SETTINGS, Setting
from benchmarks.lab.task import (
    DIFFICULTIES,
    INSTRUCTION,
    MAX_SOLUTION_TOKENS,
    draw_problem,
    is_correct,
    lab_tokenizer,
    prompt,
)
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.evaluation.sampling import sample
from trl_crisp.prompts.instructions import build_teacher_prompt
from trl_crisp.run.files import write_json

TRAIN_PROBLEMS = 4096
_TRAIN_SEED, _TEST_SEED = 10_000, 20_000


class MaskTruncated(CRISPTrainer):
    """Leaves truncated rollouts out of the loss, for the ablation. The method keeps them in."""

    def get_loss_mask(self, inputs):
        lengths = inputs["completion_mask"].sum(dim=1, keepdim=True)
        last = inputs["completion_ids"].gather(1, lengths - 1)
        ended = torch.isin(last, torch.tensor(self.eos_token_ids))
        return super().get_loss_mask(inputs) * ended


class Curve(TrainerCallback):
    """Measures accuracy and length during the run, for all problems and by difficulty."""

    def __init__(self, every_steps: int, seed: int) -> None:
        self.every_steps, self.seed = every_steps, seed
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every_steps == 0:
            groups = evaluate(model, CURVE_PROBLEMS, False, self.seed)
            self.points.append({"step": state.global_step, **groups.pop("all"), "by_difficulty": groups})


def evaluate(model: PreTrainedModel, problems: int, concise: bool, seed: int) -> dict[str, dict[str, float]]:
    """
    Sample one solution per problem at temperature 1 and grade it.

    Args:
        model: The student.
        problems: Number of problems per difficulty. For the same number, every model gets the same problems.
        concise: Whether the prompt has the instruction.
        seed: Seed of the sampling.

    Returns:
        By difficulty (`"2"` to `"7"`) and for `"all"`: accuracy, mean_tokens and truncated (a share).
    """
    rng, tokenizer = random.Random(_TEST_SEED), lab_tokenizer()
    drawn = [draw_problem(rng, k) for k in DIFFICULTIES for _ in range(problems)]
    messages = [prompt(problem) for problem in drawn]
    if concise:
        messages = [build_teacher_prompt(m, INSTRUCTION, None)[0] for m in messages]  # type: ignore[misc]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    completions = sample(
        model,
        ids["input_ids"],
        max_new_tokens=MAX_SOLUTION_TOKENS,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=seed,
        batch_size=128,
    )
    groups: dict[str, list[tuple[bool, int, bool]]] = {"all": []}
    for problem, completion in zip(drawn, completions, strict=True):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        row = (is_correct(problem, text), len(completion.token_ids), not completion.ended_by_eos)
        groups.setdefault(str(len(problem)), []).append(row)
        groups["all"].append(row)
    names = ("accuracy", "mean_tokens", "truncated")
    return {
        group: {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}
        for group, rows in groups.items()
    }


def training_rows() -> Dataset:
    """Return the prompts that every run trains on. Each run shuffles them with its seed."""
    rng = random.Random(_TRAIN_SEED)
    return Dataset.from_list(
        [{"prompt": prompt(draw_problem(rng, rng.choice(DIFFICULTIES)))} for _ in range(TRAIN_PROBLEMS)]
    )


def run(name: str, seed: int) -> dict[str, Any]:
    """Train and measure one setting with one seed, and return the result with the whole protocol."""
    setting, protocol = SETTINGS[name], protocol_of(name, seed)
    start, wall_start = time.process_time(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / setting.form, dtype=torch.float32)
    logs: list[dict[str, float]] = []
    points: list[dict[str, Any]] = []
    if protocol["config"]["max_steps"]:
        model, logs, points = train(model, setting, protocol["config"])
    keep = ("step", "loss", "reverse_kl", "entropy", "teacher_entropy", "completions/mean_length", "teacher/refreshes")
    return {
        "schema": "trl-crisp lab run 1",
        "setting": name,
        "about": setting.about,
        "seed": seed,
        "protocol": {
            **protocol,
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
            "versions": {p: importlib.metadata.version(p) for p in ("trl", "transformers", "peft", "torch")},
        },
        "plain": evaluate(model, FINAL_PROBLEMS, False, seed),
        "concise": evaluate(model, FINAL_PROBLEMS, True, seed),
        "curve": points,
        "log": [{key: log[key] for key in keep if key in log} for log in logs if "loss" in log],
        "cpu_seconds": round(time.process_time() - start, 1),
        "wall_seconds": round(time.monotonic() - wall_start, 1),
    }


def train(
    model: PreTrainedModel, setting: Setting, fields: dict[str, Any]
) -> tuple[PreTrainedModel, list[dict[str, float]], list[dict[str, Any]]]:
    """
    Train a base model with `CRISPTrainer`.

    Args:
        model: The base model. It is trained in place, except with LoRA.
        setting: The run's setting.
        fields: Fields of `CRISPConfig`.

    Returns:
        The student, the trainer's log and the points of the curve.
    """
    # The ignored warnings are of deprecations inside the libraries, and of settings that the lab chose on purpose
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=__name__)
    with tempfile.TemporaryDirectory() as output_dir:
        args = CRISPConfig(
            output_dir,
            **ON_A_CPU,
            save_strategy="no",
            # The lab shows how runs end that are lost
            collapse_guard=False,
            **fields,
        )
        lora = None
        if setting.lora_rank:
            lora = LoraConfig(r=setting.lora_rank, lora_alpha=2 * setting.lora_rank, target_modules="all-linear")
        curve = Curve(every_steps=max(5, math.ceil(args.max_steps / 20)), seed=args.seed)
        callbacks: list[TrainerCallback] = [curve] if setting.curve else []
        trainer = (MaskTruncated if setting.mask_truncated else CRISPTrainer)(
            model=model,
            args=args,
            train_dataset=training_rows(),
            processing_class=lab_tokenizer(),
            peft_config=lora,
            callbacks=callbacks,
        )
        trainer.train()
    return trainer.model, trainer.state.log_history, curve.points


def main() -> None:
    """Run one setting with one seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m benchmarks.lab.run m50 0 outputs/m50-seed0.json"
    )
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("seed", type=int)
    parser.add_argument("output", type=Path, help="the JSON, which is written at the end")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, run(args.setting, args.seed))


if __name__ == "__main__":
    main()
