"""
How far engines that are not the student are from it: what the limits of [`~trl_crisp.rollouts.engine_check`] rest on.

A changed SmolLM2-135M-Instruct stands for the engine: other precision, or another prompt. It samples, and the gaps are those between its
log-probabilities of its own tokens and the float32 student's, as the check computes them.
"""

import argparse
import copy
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_crisp.rollouts.engine_check import OFF_NATS, Sampling, sampled_log_probs
from trl_crisp.run.files import write_json

RESULT = Path("benchmarks/results/engine_gap.json")
COUNTRIES = [
    "France",
    "Japan",
    "Kenya",
    "Peru",
    "Norway",
    "Egypt",
    "India",
    "Canada",
    "Spain",
    "Cuba",
    "Chile",
    "Nepal",
]
TOKENS = 60
# Weights that share a scale when a linear layer is rounded
GROUP = 64
# As the table of benchmarks/README names them
CASES = ("bfloat16", "8 bits", "another system prompt", "4 bits", "no chat template")


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_gap",
        description=__doc__,
        epilog="Example: python -m benchmarks.engine_gap --model HuggingFaceTB/SmolLM2-135M-Instruct",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="the Hub id or a directory of SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    write_json(args.json, measure(args.model))


def measure(path: str) -> dict[str, Any]:
    """Return mean gap and share above a nat of each case."""
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    student: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def ask(question: str, system: str | None = None) -> list[int]:
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    questions = [f"What is the capital of {country}, and what is it known for?" for country in COUNTRIES]
    found = {}
    for case in CASES:
        engine, prompt_of = student, ask
        if case == "bfloat16":
            engine = copy.deepcopy(student).bfloat16()
        elif case.endswith("bits"):
            engine = rounded(student, int(case.split()[0]))
        gaps = []
        for question in questions:
            given = {
                "another system prompt": lambda q: ask(q, "Answer briefly."),
                "no chat template": lambda q: tokenizer(q)["input_ids"],
            }.get(case, prompt_of)(question)
            answer = sample(engine, given)
            gaps.append((log_probs(engine, given, answer) - log_probs(student, ask(question), answer)).abs())
        gap_N = torch.cat(gaps)
        found[case] = {
            "mean_gap_nats": gap_N.mean().item(),
            "off_share": (gap_N > OFF_NATS).float().mean().item(),
            "tokens": len(gap_N),
        }
        print(case, json.dumps(found[case]), flush=True)
    return {
        "schema": "trl-crisp engine gap 1",
        "protocol": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "questions": len(questions),
            "max_new_tokens": TOKENS,
            "temperature": 1.0,
            "rounding": f"linear layers but the head, symmetric, {GROUP} weights a scale",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "cases": found,
    }


def rounded(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Return a copy whose linear layers, but for the head, are rounded to some bits and back."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            groups = module.weight.data.reshape(-1, GROUP)
            scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.data = ((groups / scale).round() * scale).reshape(module.weight.shape)
    return copied


def sample(model: Any, prompt: Sequence[int]) -> list[int]:
    """Return a sampled answer's token ids."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": TOKENS}
    return model.generate(torch.tensor([list(prompt)]), **sampling)[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of an answer's tokens, [tokens]."""
    logits_NV = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return sampled_log_probs(logits_NV, torch.tensor(list(answer)), Sampling())


if __name__ == "__main__":
    main()
