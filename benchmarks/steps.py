"""
Compares the training half of a step (teacher, student, backward, optimizer) with TRL's trainers: time and memory.

    python examples/get_smollm2.py smollm2
    python -m benchmarks.steps --smollm2 smollm2    # the cases of this machine
    python -m benchmarks.steps --quick              # a tiny model, to see that it runs

Contestants:

- `crisp`: `CRISPTrainer`.
- `sdft`: TRL's `trl.experimental.sdft.SDFTTrainer`, which is the alternative without this package, set up to train the same:
  distillation_mode="full_logits", distillation_alpha=1 (reverse KL), teacher_model_kind="ema" with teacher_update_rate=1.0 and
  teacher_sync_steps=50 (a copy every 50 steps), and the instruction v1 as the privileged context, placed before the prompt. Its loss
  is compared with that of `crisp`.
- `distillation`: TRL's `DistillationTrainer` with a separate teacher, which is the same model. It has no instruction: its teacher reads
  the student's shorter prompt, so it computes fewer tokens.

All get the same prompts and the same completions, which are made up, because sampling is the same code in all three. Each contestant
trains in a process of its own. The processes take turns, one step at a time, and another one comes first in each round. On a GPU, which
cannot hold all three, each trains alone, one after the other. On a CPU the memory is that of two more steps of each, alone, in a process
whose allocator gives freed memory back at once: otherwise the peak also counts what it keeps.

The output is a table, and a JSON with the protocol and every measurement, in which cases that were not measured again stay.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import (
    MIB,
    REPOSITORY,
    RESULTS,
    environment,
    forget_peak_rss,
    peak_rss_mib,
    quantiles,
    rss_mib,
)

RESULT = RESULTS / "steps.json"
CONTESTANTS = ("crisp", "sdft", "distillation")
PARTS = ("loss_forward", "backward", "optimizer")
# glibc keeps freed blocks below this size, which it raises up to 32 MiB as a process frees larger ones. Set, it stays
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
# Begins the lines that a child sends
MARK = "@@"

DIFFERENCES = [
    "sdft holds both models' logits [batch, tokens, vocabulary] and their log-softmax. crisp projects hidden states in chunks of tokens, "
    "and makes the gradients in its forward. distillation projects in tiles, and again in the backward.",
    "crisp also computes both entropies, the reverse KL and both log-probabilities, and for its logs the overlap of the models' top "
    "tokens on up to 32 tokens. distillation also computes the student's entropy.",
    "crisp and sdft with LoRA have one base model, with a second adapter for the teacher; distillation has a second model.",
]


class Case(NamedTuple):
    """
    A model and the rollouts of a step. `lora_r` is 0 for full fine-tuning. `model` is a directory, or a config's numbers. Prompts have nearly
    the same length, or with `ragged_prompts` one, two, three or four times that of the shortest.
    """

    device: str
    model: str | dict[str, int]
    batch: int
    completion_tokens: int
    dtype: str = "float32"
    lora_r: int = 0
    gradient_checkpointing: bool = True
    ragged_prompts: bool = False


QWEN3_0_6B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **QWEN3_0_6B,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
# Filled in by --smollm2
SMOLLM2 = "SmolLM2-135M-Instruct"
CASES = {
    "smollm2": Case("cpu", SMOLLM2, 4, 512),
    "smollm2-ragged_prompts": Case("cpu", SMOLLM2, 4, 512, ragged_prompts=True),
    "smollm2-lora": Case("cpu", SMOLLM2, 4, 512, lora_r=16),
    **{
        f"{name}-{tokens}": Case("cuda", model, 2, tokens, "bfloat16", lora_r=32)
        for name, model in (("qwen3-0.6b", QWEN3_0_6B), ("qwen3-8b", QWEN3_8B))
        for tokens in (2048, 8192)
    },
}
QUICK = {"quick": Case("cpu", TINY, 2, 16)}


def rows(count: int, ragged: bool = False) -> list[dict[str, Any]]:
    """Return prompts with a word problem, of nearly the same length, or with one to four problems in turns."""

    def problem(i: int) -> str:
        return (
            f"A baker packs {12 + i} boxes with {5 + i % 7} rolls each and gives {3 + i % 5} boxes to a neighbour. The remaining "
            "rolls are sold for 2 dollars each. How many dollars does the baker earn?"
        )

    return [
        {"prompt": [{"role": "user", "content": "\n\n".join([problem(i)] * (1 + i % 4 if ragged else 1))}]}
        for i in range(count)
    ]


def save_model(case: Case, directory: Path) -> str:
    """Return the directory of a case's model; a random one is made there. All contestants read the same weights."""
    if isinstance(case.model, str):
        return case.model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        **case.model,  # type: ignore[arg-type]
        max_position_embeddings=32_768,
        dtype=case.dtype,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.device(case.device):
        Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, case.dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_trainer(name: str, case: Case, model: str, steps: int, output_dir: str) -> Any:
    """Return a contestant's trainer, which takes `steps` steps on made-up completions."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from trl_crisp import INSTRUCTIONS, CRISPConfig, CRISPTrainer

    common: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": case.device == "cpu",
        "bf16": False,
        "per_device_train_batch_size": case.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": case.gradient_checkpointing,
        "max_steps": steps,
        # So that the weights, and with them the losses, stay comparable
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_completion_length": case.completion_tokens,
        "temperature": 1.0,
        "model_init_kwargs": {"dtype": case.dtype},
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    dataset = rows(case.batch * steps, case.ragged_prompts)
    inputs: dict[str, Any] = {
        "model": model,
        "processing_class": AutoTokenizer.from_pretrained(model, padding_side="left"),
        "peft_config": LoraConfig(r=case.lora_r, lora_alpha=2 * case.lora_r, target_modules="all-linear")
        if case.lora_r
        else None,
    }
    if name == "crisp":
        # The seeds of the adapters are the same, so the first losses are
        args = CRISPConfig(instruction="v1", teacher_sync_steps=50, **common)
        return CRISPTrainer(**inputs, args=args, train_dataset=Dataset.from_list(dataset))
    if name == "distillation":
        return DistillationTrainer(
            **inputs,
            args=DistillationConfig(beta=1.0, teacher_model_init_kwargs={"dtype": case.dtype}, **common),
            teacher_model=model,
            train_dataset=Dataset.from_list(dataset),
        )
    sdft = SDFTConfig(
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        teacher_model_kind="ema",
        teacher_update_rate=1.0,
        teacher_sync_steps=50,
        # The instruction comes first, as in CRISP's teacher prompt
        teacher_prompt_template="{privileged_context}\n\n{prompt}",
        num_generations=1,
        **common,
    )
    contexts = [{**row, "privileged_context": INSTRUCTIONS["v1"]} for row in dataset]
    return SDFTTrainer(**inputs, args=sdft, train_dataset=Dataset.from_list(contexts))


def make_up_completions(trainer: Any, name: str, case: Case) -> None:
    """Replace the sampling of a trainer. A step's completions depend on the step alone."""
    vocab_size = trainer.model.config.vocab_size
    special = set(trainer.processing_class.all_special_ids)
    usable = torch.tensor([token for token in range(min(vocab_size, 2000)) if token not in special])

    def completions(prompts: list[Any]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        picked = torch.randint(0, len(usable), (len(prompts), case.completion_tokens), generator=generator)
        return usable[picked].tolist()

    if name == "sdft":
        trainer._generate = lambda prompts: (prompts, completions(prompts))
    else:
        trainer._generate_single_turn = lambda prompts, *args, **kwargs: completions(prompts)


def train_in_turns(name: str, case: Case, model: str, steps: int) -> None:
    """Train in this process. Before each step wait for a line; after it send what was measured, as a line."""
    from transformers import TrainerCallback

    imports_mib = rss_mib()
    seconds: dict[str, float] = {}

    def wait() -> None:
        if case.device == "cuda":
            torch.cuda.synchronize()

    def timed(part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            wait()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            wait()
            seconds[part] = time.perf_counter() - start_s
            seconds[f"{part}_cpu"] = time.process_time() - start_cpu_s
            return result

        return call

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if sys.stdin.readline() == "":
                sys.exit("nobody waits for this process any more")
            forget_peak_rss()
            if case.device == "cuda":
                torch.cuda.reset_peak_memory_stats()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            wait()
            self.start_s, self.start_cpu_s = time.perf_counter(), time.process_time()

        def on_optimizer_step(self, args, state, control, **kwargs):
            wait()
            seconds["optimizer"] = time.perf_counter() - self.start_s
            seconds["optimizer_cpu"] = time.process_time() - self.start_cpu_s

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" not in logs:
                return
            gpu_mib = torch.cuda.max_memory_allocated() / MIB if case.device == "cuda" else None
            memory = {"imports_mib": imports_mib, "peak_rss_mib": peak_rss_mib(), "peak_gpu_mib": gpu_mib}
            print(MARK + json.dumps({"loss": logs["loss"], "seconds": seconds, "memory": memory}), flush=True)

    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(name, case, model, steps, directory)
        make_up_completions(trainer, name, case)
        trainer.compute_loss = timed("loss_forward", trainer.compute_loss)
        trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
        trainer.add_callback(Turns())
        trainer.train()


class OutOfMemoryError(RuntimeError):
    """A contestant needs more memory than the GPU has."""


class Contestant:
    """A process that trains, one step at a time. Leaving the context ends it."""

    def __init__(self, name: str, case: Case, model: str, steps: int, env: dict[str, str] | None = None) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.steps", "--child", name, json.dumps(case), model, str(steps)]
        more = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on exit)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **more},
            cwd=REPOSITORY,
        )

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def step(self) -> dict[str, Any]:
        """
        Let it train one step, and return what it measured.

        Raises:
            OutOfMemoryError: If it ended because the GPU has too little memory.
            RuntimeError: If it ended before for another reason.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write("go\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        for line in stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._errors.seek(0)
        errors = self._errors.read()
        kind = OutOfMemoryError if "torch.OutOfMemoryError" in errors else RuntimeError
        raise kind(f"{self.name} ended:\n{errors[-3000:]}")


def measure(case: Case, rounds: int, contestants: tuple[str, ...] = CONTESTANTS) -> dict[str, list[dict[str, Any]]]:
    """
    Return the steps of each contestant: a warm-up, which is the first, and `rounds` measured ones. A peer for which a GPU has too little
    memory has none.

    Raises:
        RuntimeError: If `crisp` and `sdft` do not have the same loss.
    """
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = save_model(case, Path(directory))
        if case.device == "cuda":
            torch.cuda.empty_cache()
            for name in contestants:
                try:
                    with Contestant(name, case, model, 1 + rounds) as one:
                        steps[name] = [one.step() for _ in range(1 + rounds)]
                except OutOfMemoryError:
                    if name == "crisp":
                        raise
                    print(f"{name} is out of memory", file=sys.stderr, flush=True)
        else:
            running = [stack.enter_context(Contestant(name, case, model, 1 + rounds)) for name in contestants]
            for i in range(1 + rounds):
                for one in running[i % len(running) :] + running[: i % len(running)]:
                    steps[one.name].append(one.step())
                    print(f"step {i} of {one.name}: {steps[one.name][-1]}", file=sys.stderr, flush=True)
    # TRL logs four significant digits; half precision differs more
    tolerance = 2e-3 if case.dtype == "float32" else 0.05
    for mine, theirs in zip(steps.get("crisp", []), steps.get("sdft", []), strict=False):
        # So that NaN is a difference
        if not abs(mine["loss"] - theirs["loss"]) <= tolerance * abs(theirs["loss"]):
            raise RuntimeError(f"sdft computes something else: its loss is {theirs['loss']}, ours {mine['loss']}")
    return steps


def measure_memory(case: Case, contestants: tuple[str, ...] = CONTESTANTS) -> dict[str, list[dict[str, Any]]]:
    """Return a warm-up and one step of each contestant, alone in a process whose allocator gives freed memory back."""
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(case, Path(directory))
        found = {}
        for name in contestants:
            with Contestant(name, case, model, 2, GIVES_BACK) as one:
                found[name] = [one.step() for _ in range(2)]
        return found


def summarise(
    steps: dict[str, list[dict[str, Any]]], memory_steps: dict[str, list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """
    Return quantiles of each contestant, and the ratios of `crisp` to the others. The warm-up is left out.

    Args:
        steps: From [`measure`].
        memory_steps: From [`measure_memory`]; if `None`, the memory is that of `steps`.
    """
    table: dict[str, Any] = {}
    for name, all_steps in steps.items():
        if not all_steps:
            continue
        seconds = [one["seconds"] for one in all_steps[1:]]
        halves = {"": [sum(s[part] for part in PARTS) for s in seconds]}
        halves["_cpu"] = [sum(s[f"{part}_cpu"] for part in PARTS) for s in seconds]
        memory = [one["memory"] for one in (memory_steps or steps)[name][1:]]
        peaks = [m["peak_rss_mib"] if m["peak_gpu_mib"] is None else m["peak_gpu_mib"] for m in memory]
        table[name] = {
            "training_half_s": quantiles(halves[""]),
            "training_half_cpu_s": quantiles(halves["_cpu"]),
            **{f"{part}_s": quantiles([s[part] for s in seconds]) for part in PARTS},
            **{f"{part}_cpu_s": quantiles([s[f"{part}_cpu"] for s in seconds]) for part in PARTS},
            "peak_mib": max(peaks),
        }
        if memory[0]["peak_gpu_mib"] is None:
            table[name]["peak_above_imports_mib"] = max(m["peak_rss_mib"] - m["imports_mib"] for m in memory)
    mine = table["crisp"]
    for name, theirs in table.items():
        if name == "crisp":
            continue
        theirs["crisp_ratio"] = {
            key: value["p50"] / theirs[key]["p50"] if isinstance(value, dict) else value / theirs[key]
            for key, value in mine.items()
            if key in ("training_half_s", "training_half_cpu_s", "peak_mib", "peak_above_imports_mib")
        }
    return table


def table_of(cases: dict[str, Any]) -> str:
    """Return a Markdown table: medians, and the ratio of `crisp` to each other contestant."""
    lines = [
        "| case | contestant | training half, s: p50 (p20 to p80) | CPU s | peak MiB | crisp / it: time | CPU time | peak | peak above imports |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case_name, case in cases.items():
        if "skipped" in case:
            lines.append(f"| {case_name} | skipped: {case['skipped']} |" + " |" * 7)
            continue
        for name, one in case["table"].items():
            half, ratio = one["training_half_s"], one.get("crisp_ratio", {})
            keys = ("training_half_s", "training_half_cpu_s", "peak_mib", "peak_above_imports_mib")
            ratios = [f"{ratio[key]:.2f}" if key in ratio else "" for key in keys]
            lines.append(
                f"| {case_name} | {name} | {half['p50']:.3g} ({half['p20']:.3g} to {half['p80']:.3g}) | "
                f"{one['training_half_cpu_s']['p50']:.3g} | {one['peak_mib']:.0f} | " + " | ".join(ratios) + " |"
            )
        lines += [
            f"| {case_name} | {name} | out of memory |" + " |" * 6
            for name in case["steps"]
            if name not in case["table"]
        ]
    return "\n".join(lines)


def protocol(rounds: int) -> dict[str, Any]:
    """Return how the numbers were measured."""
    return {
        "measured": "loss_forward (teacher's and student's pass and the loss), backward, optimizer (clipping and step)",
        "completions": "made up, all of the full length",
        "instruction": "v1",
        "measured_steps": rounds,
        "warm_up_steps": 1,
        "order": "one step at a time in turns (CPU), or one contestant after the other (GPU), each in a process of its own",
        "peak_mib": "the most that a process held during a step (VmHWM), alone and with memory_environment; on a GPU what torch allocated",
        "memory_environment": GIVES_BACK,
        "what_differs": DIFFERENCES,
        **environment(),
    }


def run_cases(cases: dict[str, Case], rounds: int, output: Path | None, record: dict[str, Any]) -> None:
    """Measure cases, and write the record after each one. Cases in it that are not measured again stay."""
    for case_name, case in cases.items():
        entry: dict[str, Any] = {
            "size": {**case._asdict(), "model": name_of(case.model)},
            "protocol": protocol(rounds),
        }
        if case.device == "cuda" and not torch.cuda.is_available():
            entry["skipped"] = "no GPU"
        else:
            entry["steps"] = measure(case, rounds)
            entry["memory_steps"] = measure_memory(case) if case.device == "cpu" else None
            entry["table"] = summarise(entry["steps"], entry["memory_steps"])
        record["cases"][case_name] = entry
        print(table_of({case_name: entry}), flush=True)
        if output is not None:
            record["cases"] = {name: record["cases"][name] for name in (CASES | QUICK) if name in record["cases"]}
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def name_of(model: str | dict[str, int]) -> str | dict[str, int]:
    """Return how a JSON names a model."""
    if isinstance(model, dict):
        return model
    source = Path(model) / "source.json"
    return SMOLLM2 if source.exists() else Path(model).name


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="the directory that examples/get_smollm2.py wrote")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one tiny case instead")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each contestant (5)")
    parser.add_argument("--output", help=f"default: {RESULT.relative_to(REPOSITORY)}; with --quick no file is written")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        name, case_json, model, steps = args.child
        train_in_turns(name, Case(*json.loads(case_json)), model, int(steps))
        return
    cases = QUICK if args.quick else {name: CASES[name] for name in args.cases}
    if any(case.model == SMOLLM2 for case in cases.values()):
        if args.smollm2 is None:
            parser.error("the cases of SmolLM2 need its directory: run examples/get_smollm2.py, and pass --smollm2")
        cases = {
            name: case._replace(model=args.smollm2) if case.model == SMOLLM2 else case for name, case in cases.items()
        }
    output = Path(args.output) if args.output else None if args.quick else RESULT
    record: dict[str, Any] = {"contestants": __doc__.split("Contestants:\n\n")[1], "cases": {}}
    if output is not None and output.exists():
        record["cases"] = json.loads(output.read_text(encoding="utf-8"))["cases"]
    run_cases(cases, args.rounds, output, record)
    print(table_of(record["cases"]))


if __name__ == "__main__":
    main()
