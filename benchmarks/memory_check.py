"""
Compares the memory that [`~trl_crisp.models.memory.estimate_memory`] computes for an update with the peak that training steps reach on a CPU.

The peak is that of all tensors at once, as torch's profiler counts them, in the second step, when the optimizer has its states: two
micro-batches of two made-up rollouts, teacher, student, backward and optimizer. The loss takes chunks as large as on a GPU. The rows of a
half-precision head that only a CPU has to convert to float32 are so few at once that they do not count.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig, TrainerCallback

from benchmarks.environment import MIB, REPOSITORY, environment
from benchmarks.steps import Case, make_up_completions, name_of, rows, save_model
from trl_crisp.loss import kernel
from trl_crisp.models.memory import GIB_BYTES, estimate_memory
from trl_crisp.run.files import write_json

RESULT = REPOSITORY / "benchmarks" / "results" / "memory_check.json"
# Of the computed memory as a share of the measured. Of the bfloat16 gradient of the logits, which only a GPU keeps apart, it has too much
LEAST, MOST = 0.97, 1.15
MICRO_BATCH = 2
# Of rollouts of the model that is named, to save time
LARGER_MODEL_TOKENS = 256
LORA_R = 32
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}


class Check(NamedTuple):
    """A run: the dtypes of the weights and of the computation, and the tokens of a rollout."""

    lora: bool
    completion_tokens: int
    dtype: str = "float32"
    computes_in_bfloat16: bool = False


CHECKS = [
    Check(lora, tokens, dtype, in_bfloat16)
    for dtype, in_bfloat16 in (("float32", False), ("float32", True), ("bfloat16", True))
    for lora in (False, True)
    # Full fine-tuning of bfloat16 weights is refused
    if lora or dtype == "float32"
    for tokens in (256, 1024)
]


def estimate(config: PretrainedConfig, check: Check, prompt_tokens: int) -> float:
    """Return the computed peak of an update, MiB."""
    memory = estimate_memory(
        config,
        prompt_tokens=prompt_tokens,
        completion_tokens=check.completion_tokens,
        micro_batch=MICRO_BATCH,
        lora_r=LORA_R if check.lora else None,
        dtype=getattr(torch, check.dtype),
        compute_dtype=torch.bfloat16 if check.computes_in_bfloat16 else torch.float32,
    )
    return memory.update_gib * GIB_BYTES / MIB


def measure(model: str, check: Check) -> tuple[float, int]:
    """Return the measured peak of an update, MiB, and the tokens of the longest student's prompt."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(model, check, directory)
        make_up_completions(trainer, "crisp", Case("cpu", model, MICRO_BATCH, check.completion_tokens))
        watched = _Watched(trainer)
        trainer.add_callback(watched)
        before = kernel.CPU_CHUNK_TOKENS, kernel.CONVERTED_ROWS
        kernel.CPU_CHUNK_TOKENS = max(1, kernel.GPU_CHUNK_LOGITS // trainer.model.config.vocab_size)
        kernel.CONVERTED_ROWS = 128
        try:
            trainer.train()
        finally:
            kernel.CPU_CHUNK_TOKENS, kernel.CONVERTED_ROWS = before
    return watched.peak_bytes / MIB, watched.prompt_tokens


class _Watched(TrainerCallback):
    """Counts the bytes of all tensors in the second step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.peak_bytes = self.prompt_tokens = 0
        compute_loss = trainer.compute_loss

        def noting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.prompt_tokens = max(self.prompt_tokens, int(inputs["prompt_mask"].sum(dim=1).max()))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = noting

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._kept_bytes = self._bytes_kept()
            self._profile = torch.profiler.profile(profile_memory=True)
            self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self._profile.stop()
            alive = peak = 0
            for event in self._profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    alive += event.nbytes()
                    peak = max(peak, alive)
            self.peak_bytes = self._kept_bytes + peak

    def _bytes_kept(self) -> int:
        """Return the bytes of the student, the teacher and the optimizer's states."""
        tensors = [*self._trainer.model.parameters(), *self._trainer.model.buffers()]
        tensors += list(self._trainer.teacher.state_dict()["weights"].values())
        for state in self._trainer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        return sum(storages.values())


def _trainer(model: str, check: Check, directory: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    from trl_crisp import CRISPConfig, CRISPTrainer

    args = CRISPConfig(
        directory,
        use_cpu=True,
        bf16=check.computes_in_bfloat16,
        model_init_kwargs={"dtype": check.dtype},
        instruction="v1",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        max_steps=2,
        learning_rate=1e-5,
        max_completion_length=check.completion_tokens,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, target_modules="all-linear")
    return CRISPTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows(4 * MICRO_BATCH)),
        peft_config=lora if check.lora else None,
    )


def table_of(record: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = [
        "| model | training | rollouts, tokens | computed, MiB | measured | computed / measured |",
        "|" + "---|" * 6,
    ]
    for case in record["cases"]:
        check = Check(**case["check"])
        training = f"{f'LoRA r {LORA_R}' if check.lora else 'full'}, {check.dtype} weights"
        training += ", computed in bfloat16" if check.computes_in_bfloat16 and check.dtype == "float32" else ""
        ratio = case["computed_mib"] / case["measured_mib"]
        cells = (case["name"], training, f"{check.completion_tokens:,}", f"{case['computed_mib']:,.0f}")
        lines.append(f"| {' | '.join(cells)} | {case['measured_mib']:,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_check",
        description=__doc__,
        epilog="Example: python -m benchmarks.memory_check --model smollm2 (the directory that examples/get_smollm2.py wrote)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="a Hub id or a directory of a model that is measured too, beside a small random one"
    )
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "schema": "trl-crisp memory check 1",
        "protocol": {"lora_r": LORA_R, **environment()},
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        small = save_model(Case("cpu", SMALL, MICRO_BATCH, 1), Path(directory))
        models = [(small, "random Qwen3")] + ([(args.model, str(name_of(args.model)))] if args.model else [])
        for path, name in models:
            config = AutoConfig.from_pretrained(path)
            for check in CHECKS:
                if path != small and check.completion_tokens > LARGER_MODEL_TOKENS:
                    continue
                measured_mib, prompt_tokens = measure(path, check)
                case = {
                    "name": name,
                    "config": json.loads(config.to_json_string()),
                    "check": check._asdict(),
                    "prompt_tokens": prompt_tokens,
                    "computed_mib": estimate(config, check, prompt_tokens),
                    "measured_mib": measured_mib,
                }
                record["cases"].append(case)
                print({key: value for key, value in case.items() if key != "config"}, flush=True)
                write_json(args.json, record)
    print(table_of(record))


if __name__ == "__main__":
    main()
