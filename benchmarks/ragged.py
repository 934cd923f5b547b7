"""
Compares a training step on ragged rollouts as TRL pads and splits them with one whose rollouts are sorted and trimmed.

    python -m benchmarks.ragged

Completions have log-normal lengths (mean 200 tokens, sigma 0.8, cut at 512), 32 a step in micro-batches of 2. Their ids are made up, so
that no time goes into sampling. One trainer takes all steps: of each draw of lengths, one step with the split of TRL and one with ours,
in turns, on the same prompts and completions. The model is a random Llama. The output is a JSON with the protocol and every
measurement.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parent.parent
BATCH, MICRO_BATCH = 32, 2
MEAN_TOKENS, SIGMA, CAP_TOKENS = 200, 0.8, 512
# The head has 7% of the weights, as that of Qwen3-8B
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
}
# The training half of a step
PARTS = ("teacher", "student_forward", "backward", "optimizer")
SPLITS = ("trl", "sorted")
PACKAGES = ("trl-crisp", "trl", "transformers", "torch", "accelerate", "peft")


def draw_lengths(draws: int, seed: int) -> np.ndarray:
    """Return the lengths of the completions in tokens, [draws, 32]."""
    lengths = np.random.default_rng(seed).lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, (draws, BATCH))
    return np.clip(np.rint(lengths), 1, CAP_TOKENS).astype(int)


def order_of_steps(draws: int) -> list[tuple[int, str]]:
    """Return the draw and the split of each step; which of the two splits comes first alternates."""
    return [(draw, split) for draw in range(draws) for split in (SPLITS if draw % 2 == 0 else SPLITS[::-1])]


def measure(lengths: np.ndarray) -> list[dict[str, Any]]:
    """
    Train two steps on each draw, and return what each step took.

    Args:
        lengths: See [`draw_lengths`]. The first draw is the warm-up, and is left out of the result.
    """
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import DistillationTrainer

    import trl_crisp.trainer
    from tests.tiny_models import tiny_tokenizer
    from trl_crisp import CRISPConfig, CRISPTrainer

    steps = order_of_steps(len(lengths))
    pack = trl_crisp.trainer.sort_and_trim
    cpu_s: list[float] = []
    # Tokens of the passes on TRL's split, by step: computed and real
    trl_tokens: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    class Crafted(CRISPTrainer):
        """Completions with the lengths of the step's draw, and the step's split."""

        def _get_last_hidden_state(self, model, input_ids, attention_mask, logits_to_keep):
            step = self.state.global_step
            if steps[step][1] == "sorted":
                return super()._get_last_hidden_state(model, input_ids, attention_mask, logits_to_keep)
            # TRL's own, which computes the padding
            trl_tokens[step][0] += input_ids.numel()
            trl_tokens[step][1] += int(attention_mask.sum())
            return DistillationTrainer._get_last_hidden_state(self, model, input_ids, attention_mask, logits_to_keep)

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            draw, split = steps[self.state.global_step]
            keep = split == "trl"
            trl_crisp.trainer.sort_and_trim = (lambda micro_batches, _: micro_batches) if keep else pack
            generator = torch.Generator().manual_seed(draw)
            return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths[draw]]

    class CpuSeconds(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.started_s = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            cpu_s.append(time.process_time() - self.started_s)

    tokenizer = tiny_tokenizer("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**MODEL, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    )
    # 11 tokens, and the teacher's 22
    rows = [{"prompt": f"{17 + i} * {240 + i} = "} for i in range(BATCH)]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        trainer = Crafted(
            model=model,
            args=CRISPConfig(
                directory,
                instruction="Be brief.",
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=BATCH // MICRO_BATCH,
                max_steps=len(steps),
                max_completion_length=CAP_TOKENS,
                profile_steps=True,
                # The same prompts in the same order at each step
                shuffle_dataset=False,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[CpuSeconds()],
        )
        try:
            trainer.train()
        finally:
            trl_crisp.trainer.sort_and_trim = pack
    logs = [log for log in trainer.state.log_history if "loss" in log]
    measured = [
        {
            "draw": draw,
            "split": split,
            "training_half_s": sum(log[f"profile/{part}_s"] for part in PARTS),
            "step_cpu_s": cpu_s[i],
            "computed_to_real_tokens": log["profile/computed_to_real_tokens"]
            if split == "sorted"
            else trl_tokens[i][0] / trl_tokens[i][1],
            "limit_share": log["profile/limit_share"],
            **{f"{part}_s": log[f"profile/{part}_s"] for part in PARTS},
        }
        for i, ((draw, split), log) in enumerate(zip(steps, logs, strict=True))
    ]
    return [row for row in measured if row["draw"] > 0]


def summarise(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return quantiles of each split, and the ratios of ours to TRL's."""
    table: dict[str, Any] = {}
    for split in SPLITS:
        rows = [row for row in measured if row["split"] == split]
        table[split] = {
            name: {f"p{q}": float(np.percentile([row[name] for row in rows], q)) for q in (20, 50, 80)}
            for name in ("training_half_s", "step_cpu_s", "limit_share", *(f"{part}_s" for part in PARTS))
        }
        table[split]["mean_computed_to_real_tokens"] = float(np.mean([row["computed_to_real_tokens"] for row in rows]))
    table["ratio_sorted_to_trl"] = {
        name: table["sorted"][name]["p50"] / table["trl"][name]["p50"] for name in ("training_half_s", "step_cpu_s")
    }
    return table


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20, help="draws of lengths that are measured (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(REPOSITORY / "benchmarks" / "results" / "speed" / "ragged.json"))
    args = parser.parse_args()
    load_average, started = os.getloadavg()[0], datetime.now(UTC).isoformat(timespec="seconds")
    measured = measure(draw_lengths(1 + args.draws, args.seed))
    git = ["git", "-C", str(REPOSITORY)]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    protocol = {
        "started": started,
        "what": "a training step of CRISPTrainer, rollouts as TRL pads and splits them against sorted and trimmed",
        "completion_lengths": f"log-normal, mean {MEAN_TOKENS} tokens, sigma {SIGMA}, cut at {CAP_TOKENS}",
        "prompt_tokens": {"student": 11, "teacher": 22},
        "rollouts": BATCH,
        "micro_batch": MICRO_BATCH,
        "draws": args.draws,
        "seed": args.seed,
        "order": "both splits on each draw, which comes first alternates, one process, after a warm-up draw",
        "training_half": "profile/teacher_s + student_forward_s + backward_s + optimizer_s",
        "model": {"architecture": "Llama, random weights", **MODEL},
        "precision": "float32",
        "gradient_checkpointing": False,
        "device": f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average_at_start": load_average,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "uncommitted_changes_in_package": bool(
            subprocess.run([*git, "status", "--porcelain", "trl_crisp"], capture_output=True, text=True).stdout.strip()
        ),
    }
    table = summarise(measured)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"protocol": protocol, "table": table, "measurements": measured}, indent=2) + "\n", encoding="utf-8"
    )
    for split in SPLITS:
        half, tokens = table[split]["training_half_s"], table[split]["mean_computed_to_real_tokens"]
        print(
            f"{split:8} training half {half['p50']:.2f} s (p20 {half['p20']:.2f}, p80 {half['p80']:.2f}), "
            f"{tokens:.3f} tokens computed per real token"
        )
    print(", ".join(f"{name}: {value:.2f} of TRL's" for name, value in table["ratio_sorted_to_trl"].items()))
    print(f"Written to {output}")


if __name__ == "__main__":
    main()
