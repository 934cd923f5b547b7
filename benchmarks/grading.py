"""Measures the time of grading, how many reference solutions are graded as right, and the cost of expressions that never end.

The responses are the reference solutions of MATH-500 and GSM8K, which are right by definition. They are repeated in turn until the
requested number is reached.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.grading import TIMEOUT_S, Grader
from trl_crisp.run.files import write_json

# Without a limit each of these would take hours, or more memory than a machine has
BOMBS = {
    "a tower of powers": "Answer: $9^{9^{9^9}}$",
    "nested radicals": "Answer: $" + "\\sqrt{2+" * 150 + "1" + "}" * 150 + "$",
    "a megabyte of digits": "Answer: " + "7" * 1_000_000,
}


def read_solutions(math500: Path, gsm8k: Path) -> list[tuple[str, str]]:
    """Return the reference solution and the answer of each problem: MATH-500's are in a box, GSM8K's in the last line."""
    pairs = [(row["solution"], row["answer"]) for row in _rows(math500)]
    for row in _rows(gsm8k):
        solution, _, answer = row["answer"].rpartition("####")
        pairs.append((f"{solution}Answer:{answer}", answer.replace(",", "").strip()))
    return pairs


def measure(solutions: list[tuple[str, str]], responses: int, workers: int) -> dict[str, Any]:
    """Grade `responses` responses, then each bomb together with ten responses, and return the times."""
    pairs = list(itertools.islice(itertools.cycle(solutions), responses))
    with Grader(workers=workers) as grader:
        # This starts the workers and loads math-verify in them, before the time is measured
        grader.grade_all(pairs[:workers])
        start_s = time.perf_counter()
        grades = grader.grade_all(pairs)
        graded_s = time.perf_counter() - start_s
        bombs = {}
        for name, text in BOMBS.items():
            start_s = time.perf_counter()
            first, *others = grader.grade_all([(text, "1"), *pairs[:10]])
            bombs[name] = {
                "status": first.status,
                "seconds": round(time.perf_counter() - start_s, 2),
                "others_right": sum(grade.correct for grade in others),
            }
    return {
        "schema": "trl-crisp grading speed 1",
        "protocol": {
            "responses": responses,
            "of": "reference solutions of MATH-500 and GSM8K, in turns",
            "workers": workers,
            "cores": os.cpu_count(),
            "timeout_s": TIMEOUT_S,
            "bombs": "each graded beside ten reference solutions",
            "machine": platform.machine(),
            "versions": {name: importlib.metadata.version(name) for name in ("math-verify", "sympy")},
        },
        "seconds": round(graded_s, 1),
        "right": sum(grade.correct for grade in grades),
        "statuses": dict(Counter(grade.status for grade in grades)),
        "bombs": bombs,
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grading",
        description=__doc__,
        epilog="Example: python -m benchmarks.grading --math500 math500.jsonl --gsm8k gsm8k.jsonl --output grading.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--math500", type=Path, required=True, help="jsonl with solution and answer (HuggingFaceH4/MATH-500)"
    )
    parser.add_argument("--gsm8k", type=Path, required=True, help="jsonl with answer, as in openai/gsm8k")
    parser.add_argument("--responses", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = measure(read_solutions(args.math500, args.gsm8k), args.responses, args.workers)
    write_json(args.output, result)
    print(f"{args.responses} responses in {result['seconds']} s, {result['right']} right; bombs: {result['bombs']}")


if __name__ == "__main__":
    main()
