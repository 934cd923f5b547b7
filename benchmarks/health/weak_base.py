"""Makes weak bases: the lab's base models, but both stages of their training are stopped early."""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.lab.base import BATCH_SIZE, LEARNING_RATE, STEPS, WARM_UP, WARM_UP_STEPS, new_model, train_stage
from benchmarks.lab.protocol import sha256_of
from benchmarks.lab.run import evaluate
from benchmarks.lab.task import FORMS, lab_tokenizer

AIMS_PERCENT = (50, 75)
# The first stage ends at this accuracy, so that the second one, which is of the form, passes the aims
WARM_UP_ACCURACY = 0.3
# Measured every 10 steps on 20 problems per difficulty, and from the first aim on on the problems of the held-out measurement
EVERY_STEPS = 10
QUICK_PROBLEMS, PROBLEMS = 20, 50


def accuracy_of(model: LlamaForCausalLM, problems: int) -> float:
    """Return the accuracy on test problems."""
    model.eval()
    accuracy = evaluate(model, problems, False, 0)["all"]["accuracy"]
    model.train()
    return accuracy


def make(directory: Path, seed: int) -> None:
    """Train the bases of both forms, which have their first stage in common, and save each when it reaches each of the aims."""
    torch.manual_seed(seed)
    tokenizer = lab_tokenizer()
    model = new_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    warm_up_steps = WARM_UP_STEPS
    start_s = time.monotonic()

    def is_warm(step: int) -> bool:
        nonlocal warm_up_steps
        if step < 100 or step % EVERY_STEPS:
            return False
        accuracy = accuracy_of(model, QUICK_PROBLEMS)
        print(f"warm-up, step {step}: {accuracy:.3f} right, {time.monotonic() - start_s:.0f} s", flush=True)
        warm_up_steps = step
        return accuracy >= WARM_UP_ACCURACY

    train_stage(model, WARM_UP, seed, WARM_UP_STEPS, is_warm)
    for form in FORMS:
        _second_stage(copy.deepcopy(model), form, directory, seed, warm_up_steps)


def _second_stage(model: LlamaForCausalLM, form: str, directory: Path, seed: int, warm_up_steps: int) -> None:
    aims = list(AIMS_PERCENT)

    def is_done(step: int) -> bool:
        if step % EVERY_STEPS:
            return False
        accuracy = accuracy_of(model, QUICK_PROBLEMS)
        if accuracy >= aims[0] / 100 - 0.03:
            accuracy = accuracy_of(model, PROBLEMS)
        print(f"{form}, step {step}: {accuracy:.3f} right", flush=True)
        if accuracy < aims[0] / 100 - 0.03:
            return False
        _save(model, directory / f"{form}-{aims.pop(0)}", form, seed, warm_up_steps, step, accuracy)
        return not aims

    train_stage(model, FORMS[form], seed, STEPS[form], is_done)
    if aims:
        print(f"{form}: the training ended before the accuracy was {aims[0]}%.")


def _save(
    model: LlamaForCausalLM, directory: Path, form: str, seed: int, warm_up_steps: int, steps: int, accuracy: float
) -> None:
    model.eval().save_pretrained(directory)
    model.train()
    source = {
        "made_by": "python -m benchmarks.health.weak_base",
        "form": form,
        "seed": seed,
        "warm_up_steps": warm_up_steps,
        "steps": steps,
        "schedules_of_steps": [WARM_UP_STEPS, STEPS[form]],
        "solutions_a_step": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "accuracy": round(accuracy, 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "weights_sha256": sha256_of(directory),
    }
    (directory / "source.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    print(f"{directory}: sha256 of the weights {source['weights_sha256']}", flush=True)


def main() -> None:
    """Make the weak bases of both forms."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.health.weak_base"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/health"))
    args = parser.parse_args()
    make(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
