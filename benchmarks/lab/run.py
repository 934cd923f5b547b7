"""One run of the lab: a setting and a seed through CRISPTrainer, measured with and without the instruction."""

import importlib.metadata
import math
import platform
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from benchmarks.lab.base import sha256_of
from benchmarks.lab.settings import COMMON, SETTINGS, Setting
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
from trl_crisp.instructions import build_teacher_prompt
from trl_crisp.json_files import write_json
from trl_crisp.weighting import count_loss_items

FIXTURES = Path(__file__).parent / "fixtures"
# Held-out problems a difficulty: at the end, and for the curves along a run
FINAL_PROBLEMS = 100
CURVE_PROBLEMS = 20
TRAIN_PROBLEMS = 4096
_TRAIN_SEED, _TEST_SEED = 10_000, 20_000


class MaskTruncated(CRISPTrainer):
    """Leaves rollouts that did not end out of the loss, for the ablation; the method keeps them."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(dim=1, keepdim=True)
        last = output["completion_ids"].gather(1, lengths - 1)
        ended = torch.isin(last, torch.tensor(self.eos_token_ids))
        output["tool_mask"] = ended.expand_as(output["completion_mask"]).long()
        loss_mask = output["completion_mask"] * output["tool_mask"]
        output["num_items_in_batch"] = count_loss_items(loss_mask, self.args.loss_normalization)
        return output


class Curve(TrainerCallback):
    """Accuracy and length on held-out problems along the run."""

    def __init__(self, every_steps: int, seed: int) -> None:
        self.every_steps, self.seed = every_steps, seed
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every_steps == 0:
            self.points.append({"step": state.global_step, **evaluate(model, CURVE_PROBLEMS, False, self.seed)["all"]})


def evaluate(model: PreTrainedModel, problems: int, concise: bool, seed: int) -> dict[str, dict[str, float]]:
    """
    Sample one solution a problem at temperature 1 and grade it.

    Args:
        model: The student.
        problems: How many a difficulty; the same ones for every model.
        concise: With the instruction in the prompt.
        seed: Of the sampling.

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
    """Return the prompts that every run trains on; each run shuffles them by its seed."""
    rng = random.Random(_TRAIN_SEED)
    return Dataset.from_list(
        [{"prompt": prompt(draw_problem(rng, rng.choice(DIFFICULTIES)))} for _ in range(TRAIN_PROBLEMS)]
    )


def run(name: str, seed: int, output_dir: Path) -> dict[str, Any]:
    """Train and measure one setting with one seed, and return its result with the whole protocol."""
    setting, start = SETTINGS[name], time.process_time()
    wall_start = time.monotonic()
    base = FIXTURES / setting.form
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {**COMMON, **setting.overrides, "seed": seed}
    logs: list[dict[str, float]] = []
    points: list[dict[str, float]] = []
    if fields["max_steps"]:
        model, logs, points = _train(model, setting, fields, seed, output_dir)
    keep = ("step", "loss", "reverse_kl", "entropy", "teacher_entropy", "completions/mean_length", "teacher/refreshes")
    return {
        "schema": "trl-crisp lab run 1",
        "setting": name,
        "about": setting.about,
        "seed": seed,
        "protocol": {
            "form": setting.form,
            "base_sha256": sha256_of(base),
            "config": fields,
            "lora_rank": setting.lora_rank,
            "mask_truncated": setting.mask_truncated,
            "evaluation": {
                "problems_a_difficulty": FINAL_PROBLEMS,
                "difficulties": list(DIFFICULTIES),
                "temperature": 1.0,
                "samples": 1,
                "max_new_tokens": MAX_SOLUTION_TOKENS,
                "grader": "the solution's last words are `so answer SUM`",
            },
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


def _train(model, setting: Setting, fields: dict[str, Any], seed: int, output_dir: Path):
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=__name__)
    args = CRISPConfig(
        str(output_dir / f"{setting.form}-run"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **fields,
    )
    lora = None
    if setting.lora_rank:
        lora = LoraConfig(r=setting.lora_rank, lora_alpha=2 * setting.lora_rank, target_modules="all-linear")
    curve = Curve(every_steps=max(5, math.ceil(args.max_steps / 20)), seed=seed)
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


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result so that a killed run leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
