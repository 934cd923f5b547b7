"""Trains the lab's base model on solutions of both writers, half from each."""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lab.protocol import sha256_of
from benchmarks.lab.task import DIFFICULTIES, FORMS, INSTRUCTION, Form, draw_problem, lab_tokenizer, prompt, solve
from trl_crisp.prompts.instructions import build_teacher_prompt

# Both base models are first trained on the solutions with the most repetition, which teaches them to look numbers up, and then on
# solutions of their own form. In each stage the learning rate falls to zero.
WARM_UP = Form((0.9, 0.6), (0.9, 0.6), 4, 0.12)
WARM_UP_STEPS = 450
STEPS = {"tradeoff": 350, "stability": 200}
BATCH_SIZE = 48
MICRO_BATCH_SIZE = 12
LEARNING_RATE = 3e-3


def new_model(vocab_size: int, pad_id: int, eos_id: int) -> LlamaForCausalLM:
    """Return the untrained model: 0.6 M parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    return LlamaForCausalLM(config)


def train_stage(
    model: LlamaForCausalLM, form: Form, seed: int, steps: int, is_enough: Callable[[int], bool] | None = None
) -> None:
    """
    Train a model in place, with cross-entropy on solutions.

    Args:
        model: The model.
        form: How the solutions are written.
        seed: Seed of the problems and their solutions.
        steps: Optimizer steps of 48 solutions.
        is_enough: Called with the number of steps done, after each step; if it returns true, the stage ends early.
    """
    rng = random.Random(seed)
    tokenizer = lab_tokenizer()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    start = time.monotonic()
    for step in range(steps):
        batches = _draw_batches(form, tokenizer, rng)
        tokens = sum(len(solution_ids) for batch in batches for _, solution_ids in batch)
        optimizer.zero_grad()
        total_nats = 0.0
        for batch in batches:
            rows = [torch.tensor(prompt_ids + solution_ids) for prompt_ids, solution_ids in batch]
            labels = [torch.tensor([-100] * len(p) + s) for p, s in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
            targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            loss = model(input_ids=ids, labels=targets, num_items_in_batch=tokens).loss
            loss.backward()
            total_nats += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if is_enough is not None and is_enough(step + 1):
            return
        if (step + 1) % 50 == 0:
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}: loss {total_nats:.4f} nats per token, {left:.0f} s left", flush=True)


def _draw_batches(form: Form, tokenizer, rng: random.Random) -> list[list[tuple[list[int], list[int]]]]:
    """Draw the rows of a step, token ids (prompt, solution). Micro-batches have rows of similar length, to need little padding."""
    rows = []
    for _ in range(BATCH_SIZE):
        problem, concise = draw_problem(rng, rng.choice(DIFFICULTIES)), rng.random() < 0.5
        # The instruction is added as the trainer adds it
        messages, _ = build_teacher_prompt(prompt(problem), INSTRUCTION if concise else "", None)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        solution = f"{solve(problem, form, concise, rng)} {tokenizer.eos_token}"
        rows.append((tokenizer(text)["input_ids"], tokenizer(solution)["input_ids"]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    return [rows[i : i + MICRO_BATCH_SIZE] for i in range(0, BATCH_SIZE, MICRO_BATCH_SIZE)]


def main() -> None:
    """Train one base model and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.lab.base --form tradeoff. The model's place is "
        "benchmarks/lab/fixtures, but the committed results were made with the models that are there.",
    )
    parser.add_argument("--form", choices=sorted(FORMS), default="tradeoff")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lab"))
    args = parser.parse_args()
    directory = args.output_dir / args.form
    torch.manual_seed(args.seed)
    tokenizer = lab_tokenizer()
    model = new_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    train_stage(model, WARM_UP, args.seed, WARM_UP_STEPS)
    train_stage(model, FORMS[args.form], args.seed, STEPS[args.form])
    model.eval().save_pretrained(directory)
    source = {
        "made_by": "python -m benchmarks.lab.base",
        "form": args.form,
        "seed": args.seed,
        "warm_up_steps": WARM_UP_STEPS,
        "steps": STEPS[args.form],
        "solutions_a_step": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "weights_sha256": sha256_of(directory),
    }
    (directory / "source.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    print(f"{directory}: sha256 of the weights {source['weights_sha256']}")


if __name__ == "__main__":
    main()
