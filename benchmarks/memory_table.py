"""Computes the memory that training Qwen3 models needs on one GPU, and puts the table into benchmarks/README.md.

The numbers come from the models' shapes ([`~trl_crisp.models.memory.estimate_memory`]); nothing is measured and no weights are loaded.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3Config

from trl_crisp.models.memory import RunMemory, estimate_memory

OPENING, CLOSING = "<!-- memory:computed -->", "<!-- /memory:computed -->"
PROMPT_TOKENS = 1024
COMPLETION_TOKENS = (2048, 8192)
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


def row_of(size: str, training: str) -> str:
    """Return a row of the table."""
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


def render() -> str:
    """Return the Markdown table."""
    lines = [
        "| Qwen3 | training | update, 2,048 tokens | 8,192 | sampling by transformers, 2,048 | 8,192 |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row_of(size, training) for size in SHAPES for training in TRAININGS]) + "\n"


def replaced(text: str, table: str) -> str:
    """Return a text with the table between its markers."""
    before, _, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not closing:
        raise ValueError(f"the text has no {OPENING} with a {CLOSING} behind it. Add them where the table belongs.")
    return f"{before}{OPENING}\n{table}{CLOSING}{after}"


def main() -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent / "README.md")
    args = parser.parse_args()
    table = render()
    args.readme.write_text(replaced(args.readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
