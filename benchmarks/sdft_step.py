"""
Compares step time and peak memory of CRISPTrainer with those of TRL's SDFTTrainer, both set up for the same training.

    python examples/get_smollm2.py smollm2
    python benchmarks/sdft_step.py --model smollm2

`trl.experimental.sdft.SDFTTrainer` is the alternative without this package: distillation_mode="full_logits",
distillation_alpha=1 (reverse KL), teacher_model_kind="ema" with teacher_update_rate=1.0 and teacher_sync_steps=50 (a copy
every 50 steps), and the instruction v1 as the privileged context of every row, placed before the prompt. Both trainers get
the same prompts, batch, completion length and optimizer, and normalise in the same way: a mean over each completion's tokens,
then over completions. The trainers run in turns, each in its own process. The first step of each process is a short warm-up
and is not counted. The output is a JSON with the protocol and every measurement.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TRAINERS = ("crisp", "sdft")
PHASES = ("generation", "loss_forward", "backward", "optimizer", "other")
# CPU seconds of this process on all cores, which other processes on the machine affect less than the wall time
CPU_TIMES = ("step_cpu", "generation_cpu", "loss_forward_cpu", "backward_cpu")
PACKAGES = ("trl-crisp", "trl", "transformers", "torch", "accelerate", "peft", "datasets")
WARM_UP_TOKENS = 16
MIB = 2**20

DIFFERENCES = [
    "SDFT holds both models' logits [batch, tokens, vocabulary] and their log-softmax; CRISP projects hidden states in chunks of "
    "tokens, and makes the gradients in its forward.",
    "CRISP also computes both entropies, and for its logs the overlap of the models' top tokens on up to 32 tokens.",
    "SDFT cuts prompts from the left at 512 tokens (max_prompt_length); none of these is that long.",
    "SDFT takes the student's weights over after steps 50, 100, ...; CRISP at their start. Neither happens here.",
    "With bf16, SDFT's models run under accelerate's autocast and give float32 logits; CRISP's loss runs under autocast "
    "as a whole. (TRL's own DistillationTrainer steps around autocast: its loss would run in float32.)",
]


def rows(count: int) -> list[dict[str, Any]]:
    """Return word problems of nearly the same length."""
    return [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": f"A baker packs {12 + i} boxes with {5 + i % 7} rolls each and gives {3 + i % 5} boxes to a "
                    "neighbour. The remaining rolls are sold for 2 dollars each. How many dollars does the baker earn?",
                }
            ]
        }
        for i in range(count)
    ]


def measure(trainer_name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps in this process, and return the time of each phase and the memory of the process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    from trl_crisp import INSTRUCTIONS, CRISPConfig, CRISPTrainer

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": args.device == "cpu",
        "bf16": args.precision == "bf16",
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": 1 + args.steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_completion_length": args.tokens,
        "generation_kwargs": {"min_new_tokens": args.tokens},
        "temperature": 1.0,
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_sync_steps": 50,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    dataset = rows(args.batch * (1 + args.steps))
    inputs: dict[str, Any] = {
        "model": args.model,
        "processing_class": AutoTokenizer.from_pretrained(args.model, padding_side="left"),
    }
    if trainer_name == "crisp":
        trainer: Any = CRISPTrainer(
            **inputs, args=CRISPConfig(instruction="v1", **common), train_dataset=Dataset.from_list(dataset)
        )
        generate = "_generate_single_turn"
    else:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        config = SDFTConfig(
            distillation_mode="full_logits",
            distillation_alpha=1.0,
            teacher_model_kind="ema",
            teacher_update_rate=1.0,
            # The instruction comes first, as in CRISP's teacher prompt
            teacher_prompt_template="{privileged_context}\n\n{prompt}",
            num_generations=1,
            **common,
        )
        trainer = SDFTTrainer(
            **inputs,
            args=config,
            train_dataset=Dataset.from_list([{**row, "privileged_context": INSTRUCTIONS["v1"]} for row in dataset]),
        )
        generate = "_generate"

    phases: dict[str, list[float]] = defaultdict(list)
    steps_s: list[float] = []
    steps_cpu_s: list[float] = []

    def wait() -> None:
        if args.device != "cpu":
            torch.cuda.synchronize()

    def timed(phase: str, function: Callable) -> Callable:
        def call(*a, **k):
            wait()
            start, start_cpu = time.perf_counter(), time.process_time()
            result = function(*a, **k)
            wait()
            phases[phase].append(time.perf_counter() - start)
            phases[f"{phase}_cpu"].append(time.process_time() - start_cpu)
            return result

        return call

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wait()
            self.start, self.start_cpu = time.perf_counter(), time.process_time()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.optimizer_start = time.perf_counter()

        def on_optimizer_step(self, args, state, control, **kwargs):
            wait()
            phases["optimizer"].append(time.perf_counter() - self.optimizer_start)

        def on_step_end(self, args, state, control, **kwargs):
            wait()
            steps_s.append(time.perf_counter() - self.start)
            steps_cpu_s.append(time.process_time() - self.start_cpu)
            if state.global_step == 1:
                set_tokens(tokens)

    def set_tokens(count: int) -> None:
        for settings in (trainer.generation_kwargs, trainer.generation_config.__dict__):
            settings["max_new_tokens"] = settings["min_new_tokens"] = count

    tokens = args.tokens
    setattr(trainer, generate, timed("generation", getattr(trainer, generate)))
    trainer.compute_loss = timed("loss_forward", trainer.compute_loss)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    trainer.add_callback(Steps())
    set_tokens(min(WARM_UP_TOKENS, tokens))
    before_mib = _rss_mib()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()

    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    assert lengths[1:] == [tokens] * args.steps, lengths
    # The first step is the warm-up
    measured = {phase: values[1:] for phase, values in phases.items()}
    assert all(len(values) == args.steps for values in measured.values()), {k: len(v) for k, v in measured.items()}
    measured["step"], measured["step_cpu"] = steps_s[1:], steps_cpu_s[1:]
    measured["other"] = [
        step - sum(measured[phase][i] for phase in PHASES[:-1]) for i, step in enumerate(measured["step"])
    ]
    memory = {
        "rss_before_training_mib": before_mib,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if args.device != "cpu":
        memory["peak_cuda_allocated_mib"] = torch.cuda.max_memory_allocated() / MIB
    return {
        "trainer": trainer_name,
        "precision": args.precision,
        "seconds": measured,
        "memory": memory,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "gradient_checkpointing": trainer.model.is_gradient_checkpointing,
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "threads": torch.get_num_threads(),
    }


def run_in_child(trainer_name: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process, so that the peak memory is that of this trainer only."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, __file__, "--child", trainer_name, "--child_output", result.name]
        for name in ("model", "batch", "tokens", "steps", "seed", "device"):
            command += [f"--{name}", str(getattr(args, name))]
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if args.threads:
            env["OMP_NUM_THREADS"] = str(args.threads)
        done = subprocess.run([*command, "--precision", precision], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{trainer_name} in {precision} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(result.name).read_text(encoding="utf-8"))


def summarise(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per precision: quantiles of each trainer, and the ratios CRISP / SDFT."""
    table = []
    for precision in dict.fromkeys(m["precision"] for m in measurements):
        row: dict[str, Any] = {"precision": precision}
        for name in TRAINERS:
            mine = [m for m in measurements if m["precision"] == precision and m["trainer"] == name]
            memory = {key: _quantiles([m["memory"][key] for m in mine]) for key in mine[0]["memory"]}
            memory["peak_over_before_mib"] = _quantiles(
                [m["memory"]["peak_rss_mib"] - m["memory"]["rss_before_training_mib"] for m in mine]
            )
            row[name] = {
                "seconds": {
                    key: _quantiles([value for m in mine for value in m["seconds"][key]])
                    for key in ("step", *PHASES, *CPU_TIMES)
                },
                "memory": memory,
            }
        crisp, sdft = row["crisp"], row["sdft"]
        train_s, train_cpu_s = (
            {
                name: sum(row[name]["seconds"][phase + suffix]["p50"] for phase in ("loss_forward", "backward"))
                for name in TRAINERS
            }
            for suffix in ("", "_cpu")
        )
        row["ratio_crisp_to_sdft"] = {
            "step_seconds": crisp["seconds"]["step"]["p50"] / sdft["seconds"]["step"]["p50"],
            "loss_and_backward_seconds": train_s["crisp"] / train_s["sdft"],
            "step_cpu_seconds": crisp["seconds"]["step_cpu"]["p50"] / sdft["seconds"]["step_cpu"]["p50"],
            "loss_and_backward_cpu_seconds": train_cpu_s["crisp"] / train_cpu_s["sdft"],
            **{key: crisp["memory"][key]["p50"] / sdft["memory"][key]["p50"] for key in crisp["memory"]},
        }
        table.append(row)
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    """Print the medians, and p20 and p80 of the whole step."""
    columns = ("step", *PHASES, "step_cpu")
    print(f"{'':14}" + "".join(f"{name + ' s':>16}" for name in columns) + f"{'peak RSS MiB':>16}{'over start':>12}")
    for row in table:
        for name in TRAINERS:
            seconds, memory = row[name]["seconds"], row[name]["memory"]
            print(
                f"{name} {row['precision']:<8}"[:14].ljust(14)
                + "".join(f"{seconds[key]['p50']:>16.2f}" for key in columns)
                + f"{memory['peak_rss_mib']['p50']:>16.0f}{memory['peak_over_before_mib']['p50']:>12.0f}"
                + f"   step p20-p80 {seconds['step']['p20']:.2f}-{seconds['step']['p80']:.2f}"
            )
        ratio = row["ratio_crisp_to_sdft"]
        print("CRISP / SDFT: " + ", ".join(f"{key} {value:.2f}" for key, value in ratio.items()))


def protocol(args: argparse.Namespace, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how the numbers were measured."""
    source = Path(args.model) / "source.json"
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "trl_crisp"], capture_output=True, text=True
    ).stdout.strip()
    first = measurements[0]
    return {
        "started": args.started,
        "model": "SmolLM2-135M-Instruct" if source.exists() else Path(args.model).name,
        "model_source": json.loads(source.read_text(encoding="utf-8")) if source.exists() else None,
        "weights": "float32, full fine-tuning",
        "instruction": "v1",
        "batch_completions": args.batch,
        "completion_tokens": args.tokens,
        "completions": "sampled at temperature 1.0, length forced by min_new_tokens = max_new_tokens",
        "learning_rate": 1e-6,
        "optimizer": first["optimizer"],
        "gradient_checkpointing": first["gradient_checkpointing"],
        "measured_steps_a_process": args.steps,
        "warm_up_steps_a_process": 1,
        "repetitions": args.repetitions,
        "order": "trainers in turns, each in a process of its own",
        "seed": args.seed,
        "peak_rss": "ru_maxrss of the process over its whole life",
        "device": platform.processor() or platform.machine() if args.device == "cpu" else args.device,
        "cpu": _cpu_name(),
        "threads": first["threads"],
        "load_average_at_start": args.load_average,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit,
        "uncommitted_changes_in_package": bool(changed),
        "what_differs": DIFFERENCES,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    import numpy as np

    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def _rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="directory of a model, for example from examples/get_smollm2.py"
    )
    parser.add_argument("--batch", type=int, default=4, help="completions per step (4)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per completion (512)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per process (2)")
    parser.add_argument("--repetitions", type=int, default=2, help="processes per trainer and precision (2)")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (0: torch's default)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "sdft_step.json"))
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--child_output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Path(args.child_output).write_text(json.dumps(measure(args.child, args)), encoding="utf-8")
        return

    args.started = datetime.now(UTC).isoformat(timespec="seconds")
    args.load_average = os.getloadavg()[0]
    measurements = []
    for precision in args.precisions:
        for repetition in range(args.repetitions):
            # The order of the trainers alternates
            for name in TRAINERS if repetition % 2 == 0 else TRAINERS[::-1]:
                measurement = run_in_child(name, precision, args)
                measurements.append(measurement)
                print(
                    f"{precision} {name} {repetition + 1}/{args.repetitions}: "
                    f"step {', '.join(f'{s:.1f}' for s in measurement['seconds']['step'])} s, "
                    f"peak {measurement['memory']['peak_rss_mib']:.0f} MiB",
                    flush=True,
                )
    table = summarise(measurements)
    result = {"protocol": protocol(args, measurements), "table": table, "measurements": measurements}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(table)
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
