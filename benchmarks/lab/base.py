"""Trains the lab's base model on both writers' solutions, half and half."""

import argparse
import hashlib
import json
import random
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lab.task import DIFFICULTIES, FORMS, INSTRUCTION, Form, draw_problem, lab_tokenizer, prompt, solve
from trl_crisp.instructions import build_teacher_prompt

STEPS = 600
BATCH_SIZE = 48
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


def train_base(form_name: str, seed: int = 0, steps: int = STEPS) -> LlamaForCausalLM:
    """
    Train a base model from scratch with cross-entropy on solutions.

    Args:
        form_name: A key of [`FORMS`].
        seed: Of the weights and the problems.
        steps: Optimizer steps of 48 solutions, with a linearly decaying learning rate.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    form, tokenizer = FORMS[form_name], lab_tokenizer()
    model = new_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    start = time.monotonic()
    batches: list[list[tuple[list[int], list[int]]]] = []
    for step in range(steps):
        batches = batches or _draw_batches(form, tokenizer, rng)
        rows = [torch.tensor(prompt_ids + solution_ids) for prompt_ids, solution_ids in batches[-1]]
        labels = [torch.tensor([-100] * len(p) + s) for p, s in batches.pop()]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f} nats a token, {left:.0f} s left", flush=True)
    return model.eval()


def _draw_batches(form: Form, tokenizer, rng: random.Random) -> list[list[tuple[list[int], list[int]]]]:
    """Draw some batches of token ids (prompt, solution), each of solutions of like length, which need little padding."""
    rows = []
    for _ in range(BATCH_SIZE * len(DIFFICULTIES)):
        problem, concise = draw_problem(rng, rng.choice(DIFFICULTIES)), rng.random() < 0.5
        # As the trainer puts the instruction in
        messages, _ = build_teacher_prompt(prompt(problem), INSTRUCTION if concise else "", None)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        solution = f"{solve(problem, form, concise, rng)} {tokenizer.eos_token}"
        rows.append((tokenizer(text)["input_ids"], tokenizer(solution)["input_ids"]))
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    batches = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
    rng.shuffle(batches)
    return batches


def sha256_of(directory: Path) -> str:
    """Return the hash of a saved model's weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Train one base model and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Example: python -m benchmarks.lab.base --form tradeoff --seed 0"
    )
    parser.add_argument("--form", choices=sorted(FORMS), default="tradeoff")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/lab/fixtures"))
    args = parser.parse_args()
    directory = args.output_dir / args.form
    train_base(args.form, args.seed, args.steps).save_pretrained(directory)
    source = {
        "made_by": "python -m benchmarks.lab.base",
        "form": args.form,
        "seed": args.seed,
        "steps": args.steps,
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
