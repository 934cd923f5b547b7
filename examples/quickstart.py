"""CRISP on a real model in minutes, on a CPU: measure, train, measure again, show. `bash examples/quickstart.sh` runs it.

SmolLM2-135M-Instruct answers word problems (reasoning-gym's leg_counting: how many legs do 9 insects, 10 horses and 3
shrimps have?) before and after training with `examples/configs/smollm2-cpu.yaml`, with the plain prompt and with the
instruction in the prompt. Training and held-out rows come from the same generator, never with the same text.

What this shows is length. The model solves next to none of these problems, before or after, so it cannot show whether
accuracy holds; for that see the larger configs.

--output_dir receives results.json (the protocol and every number), length.png, model/ and base-*.json (measurements of
the untrained model, which a later run with the same protocol uses again).
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
CONFIG = ROOT / "examples" / "configs" / "smollm2-cpu.yaml"
TASK = "leg_counting"
PACKAGES = ("trl-crisp", "trl", "transformers", "torch", "peft", "accelerate", "datasets", "reasoning-gym", "numpy")

# The paper's evaluation: temperature 0.6, top-p 0.95, top-k 20. One answer a problem is ours: more problems tell more.
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
# reasoning-gym's row i of seed s is drawn from s + i, so seeds that are near each other share rows
HELD_OUT_SEED = 7_000_000
TRAINING_SEED = 2_000_000
SEED_STRIDE = 10_000
# Ours: the first cap; it grows until it is three times the mean length of the untrained model's answers
CAP_TOKENS = 448
CAP_RATIO = 3
# Ours: enough for an interval that tells something, few enough for ten minutes
HELD_OUT_ROWS = 112
# All rows of both prompts at once: a few rows take nearly as long as many
BATCH_ROWS = 2 * HELD_OUT_ROWS
# The form for continuous integration: real, but too short for a verdict. The teacher is refreshed once.
QUICK_HELD_OUT_ROWS = 8
QUICK_STEPS = 2
QUICK_SYNC_STEPS = 2
QUICK_CAP_TOKENS = 96

# Ours: casting the weights takes a part of what faster products save
BF16_LEAST_SPEEDUP = 1.5

PROMPTS = ("plain", "concise")
# Of the answers to read; the results have all of them
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Answer:
    """One held-out answer, as it is kept in the results."""

    text: str
    tokens: int
    ended_by_eos: bool
    empty: bool
    repeats: bool
    correct: bool


def main() -> None:
    args = parse_args()
    started_s = time.monotonic()
    seconds: dict[str, float] = {}
    quiet()
    from rich.console import Console

    console = Console()
    output_dir = args.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    console.rule("1/4  Model and problems")
    model_dir, source = obtain_model(args.model)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_crisp.prompts.instructions import resolve_instruction
    from trl_crisp.rows.prompts import load_prompts
    from trl_crisp.train import parse_args as parse_training_args

    bf16_speedup = measure_bf16_speedup()
    flags = training_flags(args, model_dir, bf16=bf16_speedup >= BF16_LEAST_SPEEDUP)
    script_args, training_args, model_args, _ = parse_training_args(flags)
    assert model_args.model_name_or_path is not None
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    # Float32 whatever the training's products are in: the answers' cost is reading the weights, not multiplying, and in
    # bfloat16 weights small updates would round away
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    set_weight_layout(model, columns_first=True)
    training_rows, _ = load_prompts(script_args)
    instruction = resolve_instruction(training_args.instruction)
    problems = held_out_problems(args, {row["question"] for row in training_rows})
    protocol: dict[str, Any] = {
        "model": source,
        "task": f"reasoning-gym {TASK}",
        "held_out_seed": HELD_OUT_SEED + SEED_STRIDE * args.seed,
        "held_out_rows": len(problems),
        "samples_per_problem": 1,
        "sampling": {**SAMPLING, "seed": args.seed},
        "cap_tokens_at_first": QUICK_CAP_TOKENS if args.quick else CAP_TOKENS,
        "instruction": instruction,
        "grader": "the last number in the answer equals the problem's",
        "dtype": "float32",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    seconds["model_and_problems"] = time.monotonic() - started_s
    console.print(
        f"{len(problems)} held-out problems, {len(training_rows)} for training, "
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores."
    )

    console.rule("2/4  Answers before training")
    stage_s = time.monotonic()
    before, cap_tokens, reused = measure_base(model, tokenizer, problems, protocol, instruction, args, console)
    seconds["before"] = time.monotonic() - stage_s

    console.rule("3/4  Training with CRISP")
    stage_s = time.monotonic()
    log_history, model = train(model, tokenizer, training_args, model_args, training_rows, console)
    seconds["training"] = time.monotonic() - stage_s

    console.rule("4/4  Answers after training")
    stage_s = time.monotonic()
    after = measure(model, tokenizer, problems, instruction, cap_tokens, args.seed, console)
    seconds["after"] = time.monotonic() - stage_s

    from trl_crisp.report.figures import completion_length_figure

    set_weight_layout(model, columns_first=False)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    figure = completion_length_figure(
        log_history, output_dir / "length.png", title="SmolLM2-135M-Instruct, CRISP: length of the rollouts"
    )
    seconds["total"] = time.monotonic() - started_s
    results = {
        "protocol": {**protocol, "cap_tokens": cap_tokens, "quick": args.quick, "seed": args.seed},
        "training": {
            "config": CONFIG.name,
            "seed": args.seed,
            "dataset_seed": script_args.dataset_seed,
            "rows": len(training_rows),
            "lora": model_args.use_peft,
            "bf16_speedup_of_a_product": round(bf16_speedup, 2),
            **{name: getattr(training_args, name) for name in TRAINING_VALUES},
            "lr_scheduler_type": str(training_args.lr_scheduler_type),
        },
        "machine": machine(),
        "commit": commit(),
        "before_reused": reused,
        "wall_s": {name: round(value, 1) for name, value in seconds.items()},
        "cpu_s": round(time.process_time(), 1),
        "summary": summarize(before, after),
        "log_history": log_history,
        "answers": {
            side: {prompt: [asdict(answer) for answer in answers[prompt]] for prompt in PROMPTS}
            for side, answers in (("before", before), ("after", after))
        },
    }
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results, problems, before, after, console)
    console.print(f"\nWrote {output_dir / 'results.json'}, {figure} and the model in {output_dir / 'model'}.")
    console.print(f"Total: {seconds['total'] / 60:.1f} minutes; {results['cpu_s'] / 60:.1f} CPU minutes.")
    programs = Path(sys.executable).parent
    console.print(
        "\nNext, your own model and problems (see --help for every field):\n"
        f"  {programs / 'trl-crisp'} train --model_name_or_path YOUR_MODEL --dataset_name YOUR_PROMPTS.jsonl "
        "--prompt_template '{prompt}' --instruction v2 --output_dir crisp-output\n"
        "or, on GPUs, the paper's setting:\n"
        f"  {programs / 'pip'} install deepspeed\n"
        f"  {programs / 'accelerate'} launch --config_file examples/accelerate/zero3.yaml examples/train.py --config "
        "examples/configs/qwen3-8b-v2.yaml",
        highlight=False,
        soft_wrap=True,
    )


TRAINING_VALUES = (
    "instruction",
    "teacher_model_kind",
    "teacher_sync_steps",
    "loss_normalization",
    "loss_temperature",
    "beta",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "max_steps",
    "temperature",
    "top_p",
    "bf16",
    "gradient_checkpointing",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the rows, the rollouts and the answers")
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart-output"))
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "models" / "SmolLM2-135M-Instruct",
        help="directory of the model; filled with SmolLM2-135M-Instruct unless it holds a model already",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about a minute: a few steps and answers, to see that everything runs"
    )
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: seeds count from 0.")
    return args


def quiet() -> None:
    """Leaves the libraries' progress bars and notices out; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def obtain_model(directory: Path) -> tuple[Path, dict[str, str]]:
    """The directory of the model and where it came from; a directory without `source.json` is the user's own."""
    from get_smollm2 import MARKER, WEIGHTS, get_smollm2

    if (directory / "config.json").is_file() and not (directory / MARKER).is_file():
        weights = directory / WEIGHTS
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "several files"
        return directory, {"source": "local", "name": directory.name, "weights_sha256": sha256}
    return directory, get_smollm2(directory)


def measure_bf16_speedup() -> float:
    """How many times faster than in float32 a product of the training's size is in bfloat16 on this machine."""
    import torch

    # A micro-batch's tokens through an MLP layer of the model
    tokens, width, hidden = 1024, 576, 1536
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        tokens_TD, weight_HD = torch.ones(tokens, width, dtype=dtype), torch.ones(hidden, width, dtype=dtype)
        times_s = []
        # The first calls choose and prepare a kernel
        for _ in range(8):
            start_s = time.perf_counter()
            torch.nn.functional.linear(tokens_TD, weight_HD)
            times_s.append(time.perf_counter() - start_s)
        seconds[dtype] = min(times_s)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def set_weight_layout(model: Any, *, columns_first: bool) -> None:
    """Stores the linear layers' weights column by column in memory, or row by row again, as files have them.

    The values and the shapes stay. A product with a handful of rows, which decoding consists of, is faster on a
    CPU with the columns first.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            module.weight.data = weight.t().contiguous().t() if columns_first else weight.contiguous()


def training_flags(args: argparse.Namespace, model_dir: Path, bf16: bool) -> list[str]:
    """The config file and what the quickstart sets over it."""
    flags = ["--config", str(CONFIG), "--model_name_or_path", str(model_dir)]
    flags += ["--output_dir", str(args.output_dir / "training"), "--seed", str(args.seed)]
    flags += ["--dataset_seed", str(TRAINING_SEED + SEED_STRIDE * args.seed)]
    # The quickstart draws its own progress and saves the model itself
    flags += ["--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none"]
    flags += ["--bf16", str(bf16).lower()]
    quick_flags = ["--max_steps", str(QUICK_STEPS), "--teacher_sync_steps", str(QUICK_SYNC_STEPS)]
    return [*flags, *quick_flags] if args.quick else flags


def held_out_problems(args: argparse.Namespace, training_questions: set[str]) -> list[dict[str, str]]:
    """Question and answer of the held-out problems, none with the text of a training row or of another one."""
    import reasoning_gym

    rows = QUICK_HELD_OUT_ROWS if args.quick else HELD_OUT_ROWS
    dataset = reasoning_gym.create_dataset(TASK, size=4 * rows, seed=HELD_OUT_SEED + SEED_STRIDE * args.seed)
    seen = set(training_questions)
    problems: list[dict[str, str]] = []
    for row in dataset:
        if row["question"] not in seen and len(problems) < rows:
            seen.add(row["question"])
            problems.append({"question": row["question"], "answer": str(row["answer"])})
    assert len(problems) == rows
    return problems


def measure_base(
    model: Any,
    tokenizer: Any,
    problems: list[dict[str, str]],
    protocol: dict[str, Any],
    instruction: str,
    args: argparse.Namespace,
    console: Any,
) -> tuple[dict[str, list[Answer]], int, bool]:
    """The untrained model's answers, the cap they were sampled with, and whether they are an earlier run's.

    The cap is at least three times the mean length: a tighter one would hide the long answers that training shortens.
    """
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    cache = args.output_dir / f"base-{key}.json"
    if cache.is_file():
        console.print(f"Using the answers in {cache}: same model, problems, sampling and library versions.")
        kept = json.loads(cache.read_text())
        return {side: [Answer(**row) for row in kept["answers"][side]] for side in PROMPTS}, kept["cap_tokens"], True
    cap_tokens = protocol["cap_tokens_at_first"]
    while True:
        answers = measure(model, tokenizer, problems, instruction, cap_tokens, args.seed, console)
        mean_tokens = sum(answer.tokens for answer in answers["plain"]) / len(problems)
        # The minute's form makes no claim, and its cap stays where it is
        if args.quick or cap_tokens >= CAP_RATIO * mean_tokens:
            break
        cap_tokens *= 2
        console.print(f"Mean of {mean_tokens:.0f} tokens: measuring again with answers of up to {cap_tokens}.")
    partial = cache.with_suffix(".partial")
    kept = {side: [asdict(answer) for answer in answers[side]] for side in PROMPTS}
    partial.write_text(json.dumps({"cap_tokens": cap_tokens, "protocol": protocol, "answers": kept}, indent=1))
    partial.replace(cache)
    return answers, cap_tokens, False


def measure(
    model: Any,
    tokenizer: Any,
    problems: list[dict[str, str]],
    instruction: str,
    cap_tokens: int,
    seed: int,
    console: Any,
) -> dict[str, list[Answer]]:
    """Answers to the held-out problems with the plain prompt and with the instruction before the problem."""
    from trl_crisp.evaluation.metrics import repeats_itself
    from trl_crisp.evaluation.sampling import SamplingProgress, sample
    from trl_crisp.prompts.instructions import build_teacher_prompt

    plain = [[{"role": "user", "content": problem["question"]}] for problem in problems]
    concise = [build_teacher_prompt(messages, instruction, None)[0] for messages in plain]
    token_ids = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in [*plain, *concise]
    ]
    with stage(console, "answers", len(token_ids)) as advance:

        def show_progress(now: SamplingProgress) -> None:
            left_s = now.left_at_most_s
            left = "" if left_s is None else f", {left_s:.0f} s left if the rest runs to the cap"
            advance(now.rows_done, f"{now.tokens_per_s:.0f} tokens/s{left}")

        # Both prompts in one batch: the few answers that run to the cap then take their time once
        completions = sample(
            model,
            token_ids,
            max_new_tokens=cap_tokens,
            seed=seed,
            batch_size=BATCH_ROWS,
            progress=show_progress,
            **SAMPLING,  # type: ignore[arg-type]
        )
    answers: dict[str, list[Answer]] = {prompt: [] for prompt in PROMPTS}
    for place, completion in enumerate(completions):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        answers[PROMPTS[place // len(problems)]].append(
            Answer(
                text=text,
                tokens=len(completion.token_ids),
                ended_by_eos=completion.ended_by_eos,
                empty=not text.strip(),
                repeats=repeats_itself(text),
                correct=last_number(text) == float(problems[place % len(problems)]["answer"]),
            )
        )
    return answers


def last_number(text: str) -> float | None:
    """The last number in a text, thousands separators allowed; None where there is none."""
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def stage(console: Any, description: str, total: int) -> Any:
    """A progress bar as a context; it yields `advance(done, note)`. Without a terminal it prints a line now and then."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        if not console.is_terminal:
            last_s = time.monotonic()

            def print_line(done: int, note: str) -> None:
                nonlocal last_s
                if done == total or time.monotonic() - last_s > 15:
                    last_s = time.monotonic()
                    console.print(f"  {description}: {done}/{total}, {note}", highlight=False)

            yield print_line
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            task = progress.add_task(description, total=total, note="")
            yield lambda done, note: progress.update(task, completed=done, note=note)

    return bar()


def train(
    model: Any, tokenizer: Any, training_args: Any, model_args: Any, rows: Any, console: Any
) -> tuple[list[dict[str, Any]], Any]:
    """Trains `model` and returns the log of every step and the trained model."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import get_peft_config

    from trl_crisp import CRISPTrainer

    class ShowSteps(TrainerCallback):
        def __init__(self, advance: Callable[[int, str], None]) -> None:
            self.advance = advance
            self.start_s = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                left_s = (time.monotonic() - self.start_s) / state.global_step * (state.max_steps - state.global_step)
                self.advance(
                    state.global_step,
                    f"loss {logs['loss']:.4f}, {logs['completions/mean_length']:.0f} tokens a rollout, "
                    f"{logs['teacher/refreshes']:.0f} refreshes, {left_s:.0f} s left",
                )

    trainer = CRISPTrainer(
        model, training_args, rows, processing_class=tokenizer, peft_config=get_peft_config(model_args)
    )
    # It would print every log as a dict
    trainer.remove_callback(PrinterCallback)
    with stage(console, "training", training_args.max_steps) as advance:
        trainer.add_callback(ShowSteps(advance))
        trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return trainer.state.log_history, trained.merge_and_unload() if model_args.use_peft else trained


def summarize(before: dict[str, list[Answer]], after: dict[str, list[Answer]]) -> dict[str, Any]:
    """Mean tokens, shares and accuracy of each side and prompt, and the reductions with their intervals."""
    from trl_crisp.evaluation.metrics import paired_bootstrap_reduction, share

    def describe(answers: list[Answer]) -> dict[str, float]:
        return {
            "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
            **{
                name: share([getattr(answer, name) for answer in answers])
                for name in ("ended_by_eos", "empty", "repeats", "correct")
            },
        }

    def reduction(one: list[Answer], other: list[Answer]) -> dict[str, float]:
        return asdict(paired_bootstrap_reduction([a.tokens for a in one], [a.tokens for a in other]))

    return {
        "before": {prompt: describe(before[prompt]) for prompt in PROMPTS},
        "after": {prompt: describe(after[prompt]) for prompt in PROMPTS},
        "reduction": {
            "plain_before_to_plain_after": reduction(before["plain"], after["plain"]),
            "concise_before_to_concise_after": reduction(before["concise"], after["concise"]),
            "plain_before_to_concise_before": reduction(before["plain"], before["concise"]),
        },
    }


def show(
    results: dict[str, Any],
    problems: list[dict[str, str]],
    before: dict[str, list[Answer]],
    after: dict[str, list[Answer]],
    console: Any,
) -> None:
    """The table, the verdict and three pairs to read."""
    from rich.markup import escape
    from rich.table import Table

    summary = results["summary"]
    table = Table(
        title=f"{len(problems)} held-out problems, answers of up to {results['protocol']['cap_tokens']} tokens"
    )
    for column in ("", "mean tokens", "reduction [95% interval]", "ended by EOS", "empty", "repeats", "correct"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("before, plain prompt", "before", "plain", None),
        ("before, concise prompt", "before", "concise", "plain_before_to_concise_before"),
        ("after, plain prompt", "after", "plain", "plain_before_to_plain_after"),
        ("after, concise prompt", "after", "concise", "concise_before_to_concise_after"),
    )
    for label, side, prompt, key in rows:
        values = summary[side][prompt]
        interval = summary["reduction"][key] if key else None
        cell = f"{interval['estimate']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]" if interval else "-"
        shares = [f"{values[name]:.0%}" for name in ("ended_by_eos", "empty", "repeats", "correct")]
        table.add_row(label, f"{values['mean_tokens']:.0f}", escape(cell), *shares)
    console.print()
    console.print(table)
    console.print(
        "Reductions: before/concise and after/plain against before/plain, after/concise against before/concise; paired "
        "bootstrap over problems. This model solves hardly any of these problems, before or after: read the lengths, "
        "not the accuracy. It has little reasoning to shorten, and often leaves it out. The rollouts of a step are 8, so "
        "their mean length in the figure jumps; the table is what tells.",
        highlight=False,
    )
    if results["protocol"]["quick"]:
        console.print("--quick: too few steps and answers for a verdict.")
    for problem, old, new in list(zip(problems, before["plain"], after["plain"], strict=True))[:3]:
        console.rule()
        console.print(f"[bold]Problem[/bold]  {escape(problem['question'])}", highlight=False)
        for label, answer in (("Before", old), ("After", new)):
            text = answer.text.strip()
            shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " ..."
            console.print(f"[bold]{label}, {answer.tokens} tokens[/bold]  {escape(shown)}", highlight=False)


def machine() -> dict[str, Any]:
    """What the run was measured on, as far as it matters for its times."""
    import torch

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def commit() -> str | None:
    """The commit of the checkout, with "+changes" where files differ from it; None outside of one."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


if __name__ == "__main__":
    main()
