"""Computes the memory and the time that training Qwen3 models needs on one GPU, and puts the tables into benchmarks/README.md.

The numbers come from the models' shapes ([`~trl_crisp.models.memory.estimate_memory`], [`~benchmarks.step_time.estimate_step_time`]);
nothing is measured and no weights are loaded.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config

from benchmarks.marked import put_between_marks
from benchmarks.step_time import estimate_step_time
from trl_crisp.models.memory import RunMemory, estimate_memory

PROMPT_TOKENS = 1024
COMPLETION_TOKENS = (1024, 4096, 8192)
LORA_R = 32
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings of the released models
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
TRAININGS: dict[str, dict] = {
    "full, float32": {},
    "full, float32, `teacher_offload`": {"teacher_offload": True},
    f"LoRA r {LORA_R}, float32 base": {"lora_r": LORA_R},
    f"LoRA r {LORA_R}, bfloat16 base": {"lora_r": LORA_R, "dtype": torch.bfloat16},
}


def config_of(size: str) -> Qwen3Config:
    """Return the config of a Qwen3 model."""
    hidden, intermediate, layers, heads, is_tied = SHAPES[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=is_tied,
    )


def memory_row(size: str, training: str) -> str:
    """Return a row of the table of memory."""
    memories: list[RunMemory] = [
        estimate_memory(
            config_of(size),
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=tokens,
            **TRAININGS[training],  # type: ignore[arg-type]
        )
        for tokens in COMPLETION_TOKENS
    ]
    cells = [f"{memory.update_gib:.0f}" for memory in memories] + [f"{memory.sampling_gib:.0f}" for memory in memories]
    return f"| {size} | {training} | {' | '.join(cells)} |"


def time_row(size: str) -> str:
    """Return a row of the table of seconds."""
    config = config_of(size)
    full, lora = (
        [
            estimate_step_time(config, prompt_tokens=PROMPT_TOKENS, completion_tokens=tokens, lora=is_lora)
            for tokens in COMPLETION_TOKENS
        ]
        for is_lora in (False, True)
    )
    seconds = [one.training_s for one in (*full, *lora)] + [one.sampling_s for one in lora]
    return f"| {size} | {' | '.join(f'{one:.1f}' if one < 10 else f'{one:.0f}' for one in seconds)} |"


def _header(first: tuple[str, ...], groups: tuple[str, ...]) -> list[str]:
    tokens = [f"{one:,}" for one in COMPLETION_TOKENS]
    cells = [
        *first,
        *(f"{group}, {tokens[0]} tokens" if i == 0 else one for group in groups for i, one in enumerate(tokens)),
    ]
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def memory_table() -> str:
    """Return the Markdown table of GiB."""
    lines = _header(("Qwen3", "training"), ("update", "sampling by transformers"))
    return "\n".join(lines + [memory_row(size, training) for size in SHAPES for training in TRAININGS]) + "\n"


def time_table() -> str:
    """Return the Markdown table of seconds."""
    lines = _header(("Qwen3",), ("full", "LoRA", "sampling, at least"))
    return "\n".join(lines + [time_row(size) for size in SHAPES]) + "\n"


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent / "README.md")
    args = parser.parse_args()
    text = args.readme.read_text(encoding="utf-8")
    for name, table in (("memory", memory_table()), ("time", time_table())):
        text = put_between_marks(text, f"{name}:computed", table)
        print(table)
    args.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
