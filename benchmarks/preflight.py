"""
Does `trl-crisp preflight` tell what training will do? SmolLM2-135M-Instruct on questions about the countries of cities.

For each instruction, preflight measures it before any training, on questions of train.jsonl and tune.jsonl. Then the quickstart's
training runs with it, and its result is measured on other questions, those of test.jsonl. Both changes are from the plain prompt of the
base. One instruction asks for nothing, and one asks for more. The final answer of a text is the first country that it names, of those
that are answers to any of the questions, so that agreement can be measured without an answer line.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.marked import put_between_marks
from trl_crisp.evaluation.evaluating import evaluate
from trl_crisp.evaluation.metrics import paired_bootstrap_difference, paired_bootstrap_reduction
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.evaluation.text_answers import words
from trl_crisp.health.reference import compare_agreement, count_votes, find_reference
from trl_crisp.preflight.running import run_preflight
from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.run.files import write_json

FACTS = Path("examples/facts")
CONFIG = Path("examples/configs/smollm2-cpu.yaml")
RESULT = Path("benchmarks/results/preflight.json")
# The quickstart's first, then from milder to stronger, one that asks for nothing, and one that asks for more
INSTRUCTIONS = (
    "Answer briefly in one complete sentence that contains the answer.",
    "Keep it short.",
    "Answer in one short sentence.",
    "Answer with one word.",
    "Please answer the question.",
    "Explain in great detail, with many facts and examples.",
)
SAMPLES = 3
# Of a trained model, to each held-out question: the lengths differ by tens of percent
TRAINED_SAMPLES = 1
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
MAX_TOKENS = 128
TRAINING_SEED = 3


def main() -> None:
    """Measure what is missing, and write the JSON; with --readme, write the table too."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preflight",
        description=__doc__,
        epilog="Example: python -m benchmarks.preflight --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir outputs/preflight",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="the Hub id or a directory of SmolLM2-135M-Instruct; only --readme works without"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/preflight"), help="for answers and models")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    args = parser.parse_args()
    if args.model is not None:
        write_json(args.json, measure(args.model, args.output_dir))
    if args.readme is not None:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(with_table(text, json.loads(args.json.read_text(encoding="utf-8"))), encoding="utf-8")


def measure(model: str, output_dir: Path) -> dict[str, Any]:
    """Return what preflight tells and what training does, for each instruction."""
    started_s = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    answer_of = first_country()
    before = output_dir / "preflight.jsonl"
    write_rows(before, cities("train", "tune"))
    held_out = output_dir / "test.jsonl"
    write_rows(held_out, cities("test"))
    settings = PreflightSettings(
        model=model,
        dataset=str(before),
        instructions=INSTRUCTIONS,
        prompts=len(cities("train", "tune")),
        samples=SAMPLES,
        max_completion_length=MAX_TOKENS,
        prompt_template="{question}",
        instruction_replaces="",
        grader="text",
        **SAMPLING,
    )
    told_file = output_dir / "preflight" / "preflight.json"
    if not told_file.is_file():
        run_preflight(settings, told_file.parent, on_progress=tell, answer_of=answer_of)
    told = json.loads(told_file.read_text(encoding="utf-8"))
    told_by = {one["text"]: one for one in told["instructions"]}
    base = answers_of(model, held_out, output_dir / "base", SAMPLES)
    rows = []
    for number, instruction in enumerate(INSTRUCTIONS):
        trained = output_dir / f"trained-{number}"
        if not (trained / "config.json").is_file():
            train(model, instruction, trained)
        after = answers_of(str(trained), held_out, output_dir / f"after-{number}", TRAINED_SAMPLES)
        rows.append(
            {
                "instruction": instruction,
                "preflight": told_by[instruction]["effect"],
                "verdict": told_by[instruction]["verdict"],
                "reverse_kl_nats": told_by[instruction]["reverse_kl_nats"],
                "training": changes(base, after, answer_of),
                "tokens": [[len(ids) for _, ids in row] for row in after],
            }
        )
    return {
        "schema": "trl-crisp preflight benchmark 1",
        "protocol": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "preflight_prompts": settings.prompts,
            "held_out_prompts": len(base),
            "samples": SAMPLES,
            "trained_samples": TRAINED_SAMPLES,
            **SAMPLING,
            "max_new_tokens": MAX_TOKENS,
            "training": f"{CONFIG}, seed {TRAINING_SEED}, with each instruction",
            "versions": told["protocol"]["versions"],
        },
        "base_tokens": [[len(ids) for _, ids in row] for row in base],
        "instructions": rows,
        "rank_correlation": rank_correlations(rows),
        "wall_s": round(time.monotonic() - started_s),
    }


def tell(stage: str, done: int, total: int, note: str) -> None:
    """Print progress on one line."""
    print(f"\r{stage} {done}/{total} {note}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def cities(*names: str) -> list[dict[str, Any]]:
    """Return the questions about cities of some of the files of facts."""
    lines = [line for name in names for line in (FACTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in map(json.loads, lines) if row["level"] == "cities"]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def first_country() -> Callable[[str], str | None]:
    """Return a function that finds the first country that a text names, by the first of its names; of two at one place, the longer one."""
    named = {name: row["answer"][0] for row in cities("train", "tune", "test") for name in row["answer"]}
    spoken = sorted(((words(name), country) for name, country in named.items()), key=lambda pair: -len(pair[0]))

    def answer_of(text: str) -> str | None:
        said = words(text)
        for place in range(len(said)):
            for wanted, country in spoken:
                if wanted and said[place : place + len(wanted)] == wanted:
                    return country
        return None

    return answer_of


def train(model: str, instruction: str, output_dir: Path) -> None:
    """Train as the quickstart does, with another instruction."""
    command = [sys.executable, "-m", "trl_crisp.train", "--config", str(CONFIG), "--model_name_or_path", model]
    more = ["--instruction", instruction, "--seed", str(TRAINING_SEED), "--output_dir", str(output_dir)]
    subprocess.run([*command, *more], check=True)


Answers = list[list[tuple[str, list[int]]]]


def answers_of(model: str, problems: Path, output_dir: Path, count: int) -> Answers:
    """Return text and token ids of each answer to the plain prompt, [problems, samples]."""
    settings = EvaluationSettings(
        model=model,
        benchmark=str(problems),
        samples=count,
        max_new_tokens=MAX_TOKENS,
        grader="text",
        prompt_template="{question}",
        **SAMPLING,
    )
    evaluate(settings, output_dir, on_progress=tell)
    lines = (output_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    samples = sorted(map(json.loads, lines), key=lambda sample: (sample["problem"], sample["number"]))
    return [
        [(one["text"], one["token_ids"]) for one in samples[start : start + count]]
        for start in range(0, len(samples), count)
    ]


def changes(base: Answers, after: Answers, answer_of: Callable[[str], str | None]) -> dict[str, Any]:
    """Return the changes that preflight predicts, measured: reduction, agreement and accuracy, paired over problems."""
    golds = [row["answer"] for row in sorted(cities("test"), key=lambda row: row["id"])]
    texts = [[text for text, _ in row] for row in base]
    references = [find_reference(votes) for votes in count_votes(texts, "text", answer_of)]
    known = [number for number, reference in enumerate(references) if reference is not None]
    agreed = [
        [answer_of(text) == reference.answer for text, _ in after[number]]
        for number in known
        if (reference := references[number]) is not None
    ]
    right = [
        [np.mean([answer_of(text) in gold for text, _ in row]) for row, gold in zip(side, golds, strict=True)]
        for side in (base, after)
    ]
    lengths = [[np.mean([len(ids) for _, ids in row]) for row in side] for side in (base, after)]
    found = [reference for reference in references if reference is not None]
    return {
        "reduction": asdict(paired_bootstrap_reduction(*lengths)),
        "agreement_change": asdict(compare_agreement(found, agreed)),
        "accuracy_change": asdict(paired_bootstrap_difference(*right)),
    }


def rank_correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return Spearman's correlation of preflight's estimate and training's, over instructions, for each measure."""
    found = {}
    for measure_name in ("reduction", "agreement_change", "accuracy_change"):
        sides = [[row[side][measure_name]["estimate"] for row in rows] for side in ("preflight", "training")]
        found[measure_name] = float(np.corrcoef([ranks(side) for side in sides])[0, 1])
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank; equal values share theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return a README with the table between its marks."""
    return put_between_marks(text, "preflight", table(results))


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| told | tokens %: preflight | tokens %: trained | agreement, points: preflight | trained | accuracy, points: preflight | trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["instructions"]:
        cells = [row["instruction"]]
        for name, sign in (("reduction", -100), ("agreement_change", 100), ("accuracy_change", 100)):
            for side in ("preflight", "training"):
                one = row[side][name]
                low, high = sorted(sign * one[end] for end in ("low", "high"))
                cells.append(f"{sign * one['estimate']:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {' | '.join(cells)} |")
    correlations = results["rank_correlation"]
    named = {"reduction": "tokens", "agreement_change": "agreement", "accuracy_change": "accuracy"}
    told = ", ".join(f"{named[name]} {value:.2f}" for name, value in correlations.items())
    return "\n".join([*lines, "", f"Rank correlation of preflight and training over the instructions: {told}."])


if __name__ == "__main__":
    main()
