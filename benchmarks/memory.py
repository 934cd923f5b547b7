"""
Measures how time and memory of the training half of a step grow with tokens and with the vocabulary, ours and those of TRL's trainers.

    python -m benchmarks.memory           # about half an hour on two cores
    python -m benchmarks.memory --draw    # draws the figure from the JSON only

One rollout a step, a small random model, full fine-tuning in float32 on a CPU. Contestants and turns are those of `benchmarks.steps`. The
output is a JSON with the protocol and every measurement, and a figure.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY, RESULTS
from benchmarks.steps import CONTESTANTS, Case, measure, protocol, summarise

RESULT = RESULTS / "growth.json"
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
TOKENS, AT_VOCABULARY = (512, 2048, 8192, 16_384), 8192
VOCABULARIES, AT_TOKENS = (8192, 32_768, 65_536, 151_936), 1024
LABELS = {"crisp": "CRISPTrainer", "sdft": "SDFTTrainer", "distillation": "DistillationTrainer"}


def case_of(tokens: int, vocabulary: int) -> Case:
    """Return a step of one rollout."""
    return Case("cpu", {**MODEL, "vocab_size": vocabulary}, 1, tokens)


def sizes() -> list[tuple[int, int]]:
    """Return tokens and vocabulary of each case."""
    both = [(tokens, AT_VOCABULARY) for tokens in TOKENS] + [(AT_TOKENS, vocabulary) for vocabulary in VOCABULARIES]
    return list(dict.fromkeys(both))


def run(rounds: int, output: Path, record: dict[str, Any]) -> None:
    """Measure each size, and write the record after each one. Sizes that are in it already are left as they are."""
    measured = {(one["tokens"], one["vocabulary"]) for one in record["cases"]}
    for tokens, vocabulary in sizes():
        if (tokens, vocabulary) in measured:
            continue
        steps = measure(case_of(tokens, vocabulary), rounds)
        entry = {"tokens": tokens, "vocabulary": vocabulary, "protocol": protocol(rounds)}
        record["cases"].append({**entry, "table": summarise(steps), "steps": steps})
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(row_of(record["cases"][-1]), flush=True)


def row_of(case: dict[str, Any]) -> str:
    """Return a row of the Markdown table: CPU seconds and peak of each contestant."""
    table = case["table"]
    cells = [
        f"{table[name]['training_half_cpu_s']['p50']:.3g} s, {table[name]['peak_mib']:,.0f} MiB"
        for name in CONTESTANTS
    ]
    return f"| {case['tokens']:,} | {case['vocabulary']:,} | {' | '.join(cells)} |"


def table_of(record: dict[str, Any]) -> str:
    """Return the Markdown table."""
    lines = [f"| tokens | vocabulary | {' | '.join(CONTESTANTS)} |", "|" + "---|" * (2 + len(CONTESTANTS))]
    return "\n".join(lines + [row_of(case) for case in record["cases"]])


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw CPU seconds and peak memory against tokens and against vocabulary."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    against = (("tokens", "vocabulary", AT_VOCABULARY), ("vocabulary", "tokens", AT_TOKENS))
    for column, (key, fixed, value) in enumerate(against):
        cases = sorted((case for case in record["cases"] if case[fixed] == value), key=lambda case: case[key])
        for name in CONTESTANTS:
            x = [case[key] for case in cases]
            rows = [case["table"][name] for case in cases]
            axes[0][column].plot(
                x, [row["training_half_cpu_s"]["p50"] for row in rows], marker="o", label=LABELS[name]
            )
            axes[1][column].plot(x, [row["peak_mib"] / 1024 for row in rows], marker="o", label=LABELS[name])
        axes[0][column].set_title(f"{value:,} {'words of ' if fixed == 'vocabulary' else ''}{fixed}")
        axes[1][column].set_xlabel(key)
        for row in range(2):
            axes[row][column].grid(alpha=0.3)
            axes[row][column].xaxis.set_major_locator(MaxNLocator(6))
            axes[row][column].xaxis.set_major_formatter("{x:,.0f}")
    axes[0][0].set_ylabel("training half of a step, CPU seconds")
    axes[1][0].set_ylabel("peak memory of the process, GiB")
    axes[0][0].legend()
    # The two panels of a row share it, so both have to be drawn first
    for row in range(2):
        axes[row][0].set_ylim(bottom=0)
    figure.savefig(path)


def main() -> None:
    """Measure, print the table, write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each contestant (3)")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--output", default=str(RESULT), help=f"default: {RESULT.relative_to(REPOSITORY)}")
    args = parser.parse_args()
    output = Path(args.output)
    record: dict[str, Any] = {"model": MODEL, "cases": []}
    if output.exists():
        record = json.loads(output.read_text(encoding="utf-8"))
    if not args.draw:
        run(args.rounds, output, record)
    draw(record, output.with_suffix(".png"))
    print(table_of(record))


if __name__ == "__main__":
    main()
