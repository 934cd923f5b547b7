"""
Measures the seconds of a teacher's refresh against those of a step's training half (teacher, student, backward, optimizer), on CPUs.

Every step refreshes the teacher, so that both are measured in the same step, by `profile_steps`. Rollouts are made up. In full
fine-tuning a refresh copies the model, with LoRA the adapter; under ZeRO-3 it gathers each weight of both models.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import REPOSITORY, quantiles
from benchmarks.part_of_step import ROLLOUTS, config_of, parser_of, record_of
from benchmarks.steps import Case, make_up_completions, rows
from trl_crisp.run.files import write_json
from trl_crisp.run.profile import TRAINING_PARTS

RESULT = REPOSITORY / "benchmarks" / "results" / "refresh.json"
LAUNCH_CONFIG = REPOSITORY / "examples" / "accelerate" / "zero2-cpu.yaml"
COMPLETION_TOKENS = 128
LORA_R = 32


class Setting(NamedTuple):
    """What is trained, and how. `zero_stage` is that of DeepSpeed on two processes; 0 is one process without it."""

    lora: bool
    zero_stage: int

    @property
    def processes(self) -> int:
        return 2 if self.zero_stage else 1


# As the table names them
SETTINGS = {
    "full, one process": Setting(lora=False, zero_stage=0),
    "full, ZeRO-2, two processes": Setting(lora=False, zero_stage=2),
    "full, ZeRO-3, two processes": Setting(lora=False, zero_stage=3),
    f"LoRA r {LORA_R}, one process": Setting(lora=True, zero_stage=0),
    f"LoRA r {LORA_R}, ZeRO-2, two processes": Setting(lora=True, zero_stage=2),
}


def train(setting: Setting, model: str, steps: int, tokens: int, directory: str) -> list[dict[str, float]]:
    """Train, one of the processes of a setting, and return the seconds of each step by part."""
    from datasets import Dataset
    from peft import LoraConfig

    from trl_crisp import CRISPTrainer

    args = config_of(directory, steps, tokens, setting.processes, teacher_sync_steps=1)
    trainer = CRISPTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows(ROLLOUTS * steps)),
        peft_config=LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear") if setting.lora else None,
    )
    make_up_completions(trainer, "crisp", Case("cpu", model, args.per_device_train_batch_size, tokens))
    trainer.train()
    return [
        {
            "refresh_s": log["profile/teacher_refresh_s"],
            "training_half_s": sum(log[f"profile/{part}_s"] for part in TRAINING_PARTS),
        }
        for log in trainer.state.log_history
        if "loss" in log
    ]


def measure(setting: Setting, model: str, rounds: int) -> list[dict[str, float]]:
    """
    Return the steps of a setting, trained in processes of its own. The warm-up is left out.

    Raises:
        RuntimeError: If a process fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m"]
        if setting.zero_stage:
            launch = ["launch", "--config_file", str(LAUNCH_CONFIG), "--main_process_port", "0", "-m"]
            command += ["accelerate.commands.accelerate_cli", *launch]
        command += ["benchmarks.refresh", "--model", model, "--rounds", str(rounds)]
        command += ["--child", json.dumps(setting), directory]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // setting.processes))
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{setting} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return json.loads((Path(directory) / "steps.json").read_text(encoding="utf-8"))[1:]


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Return quantiles of both, and of the refresh's share of the training half of its own step."""
    shares = [one["refresh_s"] / one["training_half_s"] for one in steps]
    by_name = {name: [one[name] for one in steps] for name in ("refresh_s", "training_half_s")}
    return {name: quantiles(values) for name, values in {**by_name, "share": shares}.items()}


def table_of(record: dict[str, Any]) -> str:
    """Return the Markdown table: medians."""
    lines = ["| training | refresh, s | training half of a step, s | refresh / training half |", "|---|---|---|---|"]
    for name, case in record["cases"].items():
        one = {key: value["p50"] for key, value in case["summary"].items()}
        lines.append(f"| {name} | {one['refresh_s']:.3f} | {one['training_half_s']:.1f} | {one['share']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = parser_of("benchmarks.refresh", __doc__, RESULT, rounds=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        setting, directory = Setting(*json.loads(args.child[0])), Path(args.child[1])
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(setting.zero_stage)
        steps = train(setting, args.model, 1 + args.rounds, COMPLETION_TOKENS, str(directory / "run"))
        if int(os.environ.get("RANK", 0)) == 0:
            write_json(directory / "steps.json", steps)
        return
    seconds = "of the main process, by profile_steps"
    record = record_of("refresh 1", args, completion_tokens=COMPLETION_TOKENS, seconds=seconds)
    for name in args.settings:
        steps = measure(SETTINGS[name], args.model, args.rounds)
        record["cases"][name] = {"steps": steps, "summary": summarise(steps)}
        write_json(args.json, record)
        print(table_of(record), flush=True)


if __name__ == "__main__":
    main()
