"""One run of the health experiment: trains with the agreement monitor, and keeps its answers and their accuracy."""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.health.answers import AnswerCode, answer_of
from benchmarks.health.settings import (
    HELD_OUT_PROBLEMS,
    MONITOR_MAX_NEW_TOKENS,
    MONITOR_PROMPTS,
    SETTINGS,
    Setting,
)
from benchmarks.lab.protocol import FINAL_PROBLEMS, FIXTURES, sha256_of
from benchmarks.lab.run import evaluate, training_rows
from benchmarks.lab.settings import ON_A_CPU
from benchmarks.lab.task import MAX_SOLUTION_TOKENS, lab_tokenizer
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.health.monitor import AgreementMonitor

# Bases that were stopped early: see weak_base. They are not in the repository
WEAK_BASES = Path("outputs/health")
SCHEMA = "trl-crisp health run 1"
LOGGED = (
    "loss",
    "reverse_kl",
    "entropy",
    "teacher_entropy",
    "grad_norm",
    "completions/mean_length",
    "completions/p95_length",
    "completions/clipped_ratio",
    "completions/repeats",
    "completions/empty",
    "teacher/age_steps",
    "teacher/refreshes",
    "teacher/postponed",
)
MEASURED = ("", "_change", "_change_low", "_change_high", "_mean_tokens", "_runtime")


class RecordingMonitor(AgreementMonitor):
    """Keeps the answers that the monitor samples, in code, and measures accuracy on the lab's test problems at the same steps."""

    def __init__(self, trainer: CRISPTrainer, more_base_samples: int) -> None:
        super().__init__(trainer, answer_of)
        # One batch for all answers is twice as fast as the engine's choice
        self.settings = replace(
            self.settings,
            max_new_tokens=MONITOR_MAX_NEW_TOKENS,
            batch_size=MONITOR_PROMPTS * trainer.args.monitor_samples,
        )
        self.more_base_samples = more_base_samples
        self.measurements: list[dict[str, Any]] = []
        self.cap = trainer.args.max_completion_length
        self.numbers = [
            [int(word) for word in problem.prompt[0]["content"].split() if word.isdigit()]
            for problem in self._problems
        ]
        self._code: AnswerCode | None = None
        self._drawn: tuple[list[int], list[list[str]], list[list[int]]] = ([], [], [])

    def _sample(self, asked: Any, seed: int, samples_per_prompt: int) -> tuple[list[list[str]], list[list[list[int]]]]:
        texts, answers = super()._sample(asked, seed, samples_per_prompt)
        self._drawn = list(asked), texts, [[len(ids) for ids in row] for row in answers]
        return texts, answers

    def _ask_base(self) -> None:
        super()._ask_base()
        asked, texts, lengths_tokens = self._drawn
        if self.more_base_samples:
            more_texts, more_answers = super()._sample(asked, self.settings.seed + 1_000_000, self.more_base_samples)
            more_tokens = [[len(ids) for ids in row] for row in more_answers]
            texts = [a + b for a, b in zip(texts, more_texts, strict=True)]
            lengths_tokens = [a + b for a, b in zip(lengths_tokens, more_tokens, strict=True)]
        self._code = AnswerCode([" ".join(str(sum(numbers))) for numbers in self.numbers], texts)
        self._keep(0, asked, texts, lengths_tokens)

    def _measure(self, state: Any) -> None:
        super()._measure(state)
        self._keep(state.global_step, *self._drawn)

    def _keep(self, step: int, asked: list[int], texts: list[list[str]], lengths_tokens: list[list[int]]) -> None:
        assert self._code is not None
        log = next(log for log in reversed(self.trainer.state.log_history) if "eval_agreement" in log)
        groups = evaluate(self.trainer.model, HELD_OUT_PROBLEMS, False, self.trainer.args.seed)
        self.measurements.append(
            {
                "step": step,
                **{
                    f"agreement{key}": rounded(log[f"eval_agreement{key}"])
                    for key in MEASURED
                    if f"eval_agreement{key}" in log
                },
                "asked": "all" if len(asked) == len(self._problems) else asked,
                "answers": " ".join(
                    "".join(self._code.encode(i, text) for text in row) for i, row in zip(asked, texts, strict=True)
                ),
                "longer_than_rollouts": " ".join(
                    "".join(str(int(tokens > self.cap)) for tokens in row) for row in lengths_tokens
                ),
                "tokens": [sum(row) for row in lengths_tokens],
                "held_out": _rounded_groups(groups),
            }
        )


def rounded(value: float) -> float:
    """Return a number with 6 significant digits."""
    return float(f"{value:.6g}")


def _rounded_groups(groups: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {group: {name: rounded(value) for name, value in values.items()} for group, values in groups.items()}


def base_directory(setting: Setting) -> Path:
    """Return where a setting's base model is."""
    return FIXTURES / setting.form if setting.base == "full" else WEAK_BASES / f"{setting.form}-{setting.base}"


def protocol_of(setting: Setting, seed: int) -> dict[str, Any]:
    """Return all that determines a run's result, except the machine and the package versions."""
    directory = base_directory(setting)
    return {
        **{
            key: value for key, value in asdict(setting).items() if key in ("form", "arm", "base", "more_base_samples")
        },
        "base_sha256": sha256_of(directory),
        "base_source": json.loads((directory / "source.json").read_text(encoding="utf-8")),
        "config": {**setting.config, "seed": seed},
        "monitor_max_new_tokens": MONITOR_MAX_NEW_TOKENS,
        "held_out": {
            "problems_a_difficulty": HELD_OUT_PROBLEMS,
            "at_the_end": FINAL_PROBLEMS,
            "samples": 1,
            "temperature": 1.0,
            "max_new_tokens": MAX_SOLUTION_TOKENS,
        },
    }


def run(name: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Train and measure one setting with one seed, and return the result with the whole protocol."""
    # The ignored warnings are of deprecations inside the libraries, and of settings that the lab chose on purpose
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=__name__)
    start, wall_start = time.process_time(), time.monotonic()
    protocol = protocol_of(setting, seed)
    model = AutoModelForCausalLM.from_pretrained(base_directory(setting), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output_dir:
        args = CRISPConfig(
            output_dir,
            **ON_A_CPU,
            save_strategy="no",
            **setting.config,
            seed=seed,
        )
        trainer = CRISPTrainer(model=model, args=args, train_dataset=training_rows(), processing_class=lab_tokenizer())
        monitor = RecordingMonitor(trainer, protocol["more_base_samples"])
        trainer.add_callback(monitor)
        trainer.is_watched = True
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    weights = hashlib.sha256()
    for key, tensor in sorted(trainer.model.state_dict().items()):
        weights.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "schema": SCHEMA,
        "setting": name,
        "seed": seed,
        "protocol": {
            **protocol,
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
            "versions": {p: importlib.metadata.version(p) for p in ("trl", "transformers", "peft", "torch")},
        },
        "difficulties": "".join(str(len(numbers)) for numbers in monitor.numbers),
        "measurements": monitor.measurements,
        "final": _rounded_groups(evaluate(trainer.model, FINAL_PROBLEMS, False, seed)),
        "final_weights_sha256": weights.hexdigest(),
        "log": {
            "step": [int(log["step"]) for log in logs],
            **{key: [rounded(log[key]) for log in logs] for key in LOGGED if key in logs[0]},
        },
        "cpu_seconds": round(time.process_time() - start, 1),
        "wall_seconds": round(time.monotonic() - wall_start, 1),
    }


def write_run(path: Path, result: dict[str, Any]) -> None:
    """Write a result with one line for each measurement and each logged metric, in one move."""
    lines = []
    for key, value in result.items():
        if key == "measurements":
            text = "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n ]"
        elif key == "log":
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Run one setting with one seed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.health.run tradeoff-m20-gated 0 outputs/gated-seed0.json",
    )
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("seed", type=int)
    parser.add_argument("output", type=Path, help="the JSON, which is written at the end")
    args = parser.parse_args()
    write_run(args.output, run(args.setting, SETTINGS[args.setting], args.seed))


if __name__ == "__main__":
    main()
