"""SmolLM2-135M-Instruct on MATH-500 and GSM8K: the base, the base told to be concise, and the model that the quickstart trained.

Evaluates with `trl-crisp eval` and prints the table of benchmarks/README.md. `--table` prints it from the committed results.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.comparison import compare
from trl_crisp.evaluation.results import load_results

RESULTS = Path("benchmarks/results/smollm2")
# Benchmark -> name in the table, number of problems (the first ones)
BENCHMARKS = {"math500": ("MATH-500", 50), "gsm8k": ("GSM8K", 100)}
MODELS = {"base": "base", "concise": "base, told to be concise (v1)", "trained": "after the quickstart (seed 0)"}
# Some answers of the base model are endless loops, and 30,000 tokens of a loop show no more than 1,024
MAX_NEW_TOKENS, BUDGET = 1024, 512
COLUMNS = (
    "problems",
    "model",
    "mean tokens",
    "change [95% interval]",
    "median",
    "cut at 1,024",
    "correct: line, box, dual",
)


def evaluate(models: dict[str, str], files: dict[str, str], output_dir: Path) -> None:
    """Evaluate each model on each benchmark, and copy the results to [`RESULTS`]."""
    from trl_crisp.cli import main

    RESULTS.mkdir(parents=True, exist_ok=True)
    for benchmark, (_, limit) in BENCHMARKS.items():
        for name, model in models.items():
            directory = output_dir / f"{benchmark}-{name}"
            arguments = ["--model", model, "--benchmark", benchmark, "--file", files[benchmark], "--limit", str(limit)]
            arguments += ["--samples", "1", "--max-new-tokens", str(MAX_NEW_TOKENS), "--budgets", str(BUDGET)]
            arguments += ["--instruction", "v1"] if name == "concise" else []
            if main(["eval", *arguments, "--batch-size", "50", "--output", str(directory)]):
                raise SystemExit(1)
            shutil.copy(directory / "results.json", RESULTS / f"{benchmark}-{name}.json")


def table_lines(directory: Path = RESULTS) -> list[str]:
    """Return the table, line by line."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for benchmark, (title, limit) in BENCHMARKS.items():
        base = load_results(directory / f"{benchmark}-base.json")
        for name, label in MODELS.items():
            results = load_results(directory / f"{benchmark}-{name}.json")
            rows.append((f"{title}, {limit}", label, *_cells(base, results, name == "base")))
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _cells(base: dict[str, Any], results: dict[str, Any], is_base: bool) -> tuple[str, ...]:
    values = results["summary"][str(MAX_NEW_TOKENS)]["all"]
    change = compare(base, results, MAX_NEW_TOKENS)["reduction"]
    shares = (values[key] for key in ("answer_accuracy", "boxed_accuracy", "accuracy"))
    return (
        f"{values['mean_tokens']:.0f}",
        "" if is_base else f"{-change['estimate']:+.0%} [{-change['high']:+.0%}, {-change['low']:+.0%}]",
        f"{values['median_tokens']:.0f}",
        f"{values['truncated']:.0%}",
        ", ".join(f"{share:.0%}" for share in shares),
    )


def main() -> None:
    """Evaluate, unless only the table is asked for, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=__doc__,
        epilog="Example: python -m benchmarks.smollm2 --model smollm2 --trained outputs/quickstart/model --math500 math500.jsonl "
        "--gsm8k gsm8k.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="print the table of the committed results")
    parser.add_argument("--model", help="SmolLM2's directory, made by python examples/get_smollm2.py DIRECTORY")
    parser.add_argument("--trained", help="directory of the model that the quickstart trained")
    parser.add_argument("--math500", help="jsonl with MATH-500's rows")
    parser.add_argument("--gsm8k", help="jsonl with GSM8K's rows")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2"))
    args = parser.parse_args()
    if not args.table:
        if missing := [name for name in ("model", "trained", "math500", "gsm8k") if getattr(args, name) is None]:
            parser.error(f"--{missing[0]} is missing. Give it, or --table to print the committed results")
        models = {"base": args.model, "concise": args.model, "trained": args.trained}
        evaluate(models, {"math500": args.math500, "gsm8k": args.gsm8k}, args.output_dir)
    print("\n".join(table_lines()))


if __name__ == "__main__":
    main()
