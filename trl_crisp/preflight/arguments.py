"""The options of `trl-crisp preflight`: the fields of PreflightSettings, under training's names."""

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from trl_crisp.config import InstructionRole
from trl_crisp.evaluation.grading import KINDS
from trl_crisp.evaluation.settings import ENGINES
from trl_crisp.preflight.settings import DTYPES, PreflightSettings
from trl_crisp.prompts.chat_template_flags import json_object

EXAMPLE = """\
example:
  trl-crisp preflight --model Qwen/Qwen3-0.6B --dataset BytedTsinghua-SIA/DAPO-Math-17k --instruction v1 v2 \\
      --max_completion_length 4096 --engine vllm --output preflight

The exit status is 0 if the measurement is complete, whatever the verdict; preflight.json has it. If it was interrupted, the same
command resumes it, and more prompts, samples or instructions start from the answers that are there.
"""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def make_preflight_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-crisp preflight`; its defaults are those of [`PreflightSettings`]."""
    parser = argparse.ArgumentParser(
        prog="trl-crisp preflight",
        description="Before training: what does an instruction do to this model on your prompts? Tokens, agreement with the plain prompt's "
        "majority answer, accuracy if the rows have answers, the first reverse KL, and what a run needs.",
        epilog=EXAMPLE,
        formatter_class=_Help,
        allow_abbrev=False,
    )

    def add(name: str, *other: str, **options: Any) -> None:
        # Dashes are accepted too, as in training
        dashed = [flag.replace("_", "-") for flag in (name, *other) if "_" in flag]
        parser.add_argument(name, *other, *dashed, **options)

    def add_field(name: str, help: str, **options: Any) -> None:
        default = PreflightSettings.__dataclass_fields__[name].default
        add(f"--{name}", default=default, help=help, **options)

    add("--model", "--model_name_or_path", required=True, help="Hub id or directory of a model or an adapter")
    add(
        "--dataset",
        "--dataset_name",
        required=True,
        help="as in training: Hub id, jsonl, json, parquet or csv file, or reasoning-gym:TASK",
    )
    parser.add_argument(
        "--instruction",
        nargs="+",
        default=list(PreflightSettings.instructions),
        help="what the teacher is told, one or more: v1 to v5, general, percent:N, words:N, a text, or a .txt file",
    )
    add_field("prompts", "how many prompts are asked, drawn from the rows", type=int)
    add_field("samples", "answers to each prompt, plain and under each instruction", type=int)
    add_field("margin", "how far accuracy or agreement may fall; 0.03 is three points", type=float)
    add_field("max_completion_length", "an answer is cut at this many tokens", type=int)
    add_field("temperature", "of the sampling", type=float)
    add_field("top_p", "of the sampling", type=float)
    add_field("top_k", "of the sampling; 0 turns it off", type=int)
    add_field("seed", "of the draw of the prompts and of the sampling", type=int)
    add_field(
        "grader",
        "how final answers are compared; by default found from the rows' answers, and math without them",
        choices=KINDS,
    )
    add_field("engine", "vllm is faster, above all on a GPU", choices=ENGINES)
    add_field("batch_size", "answers at once; by default 32 with transformers, and vLLM chooses", type=int)
    add_field("max_prompt_length", "rows with a longer prompt, in tokens, are left out", type=int)
    add_field("instruction_replaces", "the student's own instruction, which the teacher's replaces")
    add_field("instruction_role", "where the instruction goes", choices=get_args(InstructionRole))
    add_field(
        "chat_template_kwargs",
        "flags of the chat template, as JSON: '{\"enable_thinking\": false}'",
        type=json_object,
    )
    add_field("dataset_config", "the dataset's configuration")
    add_field("dataset_train_split", "the split to train on")
    add_field("prompt_column", "the column with the prompts")
    add_field("teacher_prompt_column", "the column with the teacher's prompts, which replace the instruction")
    add_field("prompt_template", "text with {column} placeholders that becomes a user message")
    add_field("dataset_size", "number of rows of a reasoning-gym task", type=int)
    add_field("dataset_seed", "seed of a reasoning-gym task", type=int)
    add_field("per_device_train_batch_size", "of the run whose needs are estimated", type=int)
    add_field("gradient_accumulation_steps", "of the run whose needs are estimated", type=int)
    add_field("max_steps", "of the run whose needs are estimated; one epoch if unset", type=int)
    add_field("lora_r", "of the adapter whose needs are estimated", type=int)
    add_field("lora_target_modules", "of the adapter whose needs are estimated", nargs="+")
    add_field("dtype", "of the weights in the run", choices=DTYPES)
    add(
        "--output",
        "--output_dir",
        type=Path,
        help="directory for preflight.json and the answers; by default preflight/MODEL-DATASET",
    )
    return parser


def settings_of(args: argparse.Namespace) -> PreflightSettings:
    """
    Return the settings that the options give.

    Raises:
        ValueError: If a value is out of its range.
    """
    fields = {name: value for name, value in vars(args).items() if name in PreflightSettings.__dataclass_fields__}
    targets = tuple(args.lora_target_modules)
    return PreflightSettings(**{**fields, "instructions": tuple(args.instruction), "lora_target_modules": targets})


def output_of(args: argparse.Namespace) -> Path:
    """Return the directory for the results."""
    if args.output is not None:
        return args.output
    names = (
        re.sub(r"[^\w.-]+", "-", Path(name).stem if Path(name).is_file() else Path(name).name)
        for name in (args.model, args.dataset)
    )
    return Path("preflight", "-".join(names))
