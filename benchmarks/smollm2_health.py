"""
What the health measures make of a real model that training harms: SmolLM2-135M-Instruct, told "Answer in one short sentence.".

Being told so costs this model several points of accuracy. The runs go on twice as long as the quickstart's, with a refresh every
8 steps, and are measured every 4 on 64 questions about cities that are not trained on. Agreement and distance need no labels; accuracy, of
the same answers, judges them. The final answer of a text is the first country that it names, as in benchmarks/preflight.py.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.environment import environment
from benchmarks.marked import put_between_marks
from benchmarks.preflight import CONFIG, FACTS, cities, first_country, write_rows
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.health.attach import attach_health
from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.rows.prompts import load_prompts
from trl_crisp.run.files import write_json

RESULT = Path("benchmarks/results/smollm2_health.json")
INSTRUCTION = "Answer in one short sentence."
SEEDS = (0, 1, 2)
MONITOR_PROMPTS = 64
FIELDS = {
    "instruction": INSTRUCTION,
    "max_steps": 16,
    "teacher_sync_steps": 8,
    "monitor_samples": 2,
    "monitor_base_samples": 6,
    "monitor_steps": 4,
    "monitor_max_new_tokens": 128,
    "monitor_grader": "text",
    "monitor_distance": True,
    "collapse_guard": False,
}
# What the JSON keeps of each log entry
_KEPT = (
    "step",
    "entropy",
    "teacher_entropy",
    "reverse_kl",
    "topk_overlap",
    "completions/mean_length",
    "health/status",
)


def main() -> None:
    """Run the seeds, and write the JSON; with --readme, write the table too."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2_health",
        description=__doc__,
        epilog="Example: python -m benchmarks.smollm2_health --model HuggingFaceTB/SmolLM2-135M-Instruct",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="the Hub id or a directory of SmolLM2-135M-Instruct; only --readme works without"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2-health"))
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--readme", type=Path, help="write the table into this file, between its marks")
    args = parser.parse_args()
    if args.model is not None:
        for seed in SEEDS:
            path = args.output_dir / f"seed{seed}.json"
            if not path.is_file():
                write_json(path, run(args.model, args.output_dir / f"seed{seed}", seed))
        runs = [json.loads((args.output_dir / f"seed{seed}.json").read_text(encoding="utf-8")) for seed in SEEDS]
        write_json(
            args.json,
            {
                "schema": "trl-crisp SmolLM2 health 1",
                "protocol": protocol(),
                "environment": environment(),
                "runs": runs,
            },
        )
    if args.readme is not None:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(with_table(text, json.loads(args.json.read_text(encoding="utf-8"))), encoding="utf-8")


def protocol() -> dict[str, Any]:
    """Return what was run."""
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "config": str(CONFIG),
        "fields": FIELDS,
        "monitor_prompts": MONITOR_PROMPTS,
        "trained_on": str(FACTS / "train.jsonl"),
    }


def run(model: str, output_dir: Path, seed: int) -> dict[str, Any]:
    """Train with one seed, and return what was logged."""
    warnings.filterwarnings("ignore")
    output_dir.mkdir(parents=True, exist_ok=True)
    monitored = output_dir / "monitor.jsonl"
    # Accuracy beside agreement wants one text per right answer, as the answers are named here
    rows = [
        {"prompt": message(row["question"]), "answer": row["answer"][0]}
        for row in cities("tune", "test")[:MONITOR_PROMPTS]
    ]
    write_rows(monitored, rows)
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    names = CRISPConfig.__dataclass_fields__
    fields = {name: value for name, value in config.items() if name in names} | FIELDS
    trainer = CRISPTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=CRISPConfig(**{**fields, "output_dir": str(output_dir), "seed": seed, "monitor_file": str(monitored)}),
        train_dataset=load_prompts(
            CRISPScriptArguments(dataset_name=config["dataset_name"], prompt_template=config["prompt_template"])
        )[0],
    )
    attach_health(trainer, answer_of=first_country())
    trainer.train()
    events = output_dir / "health_events.jsonl"
    return {
        "seed": seed,
        "log": [
            {key: value for key, value in entry.items() if key in _KEPT or key.startswith("eval_agreement")}
            for entry in trainer.state.log_history
        ],
        "events": [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
        if events.is_file()
        else [],
    }


def message(question: str) -> list[dict[str, str]]:
    """Return a question as a prompt."""
    return [{"role": "user", "content": question}]


def with_table(text: str, results: dict[str, Any]) -> str:
    """Return a README with the table between its marks."""
    return put_between_marks(text, "smollm2-health", table(results))


def table(results: dict[str, Any]) -> str:
    """Return the measurements as a table in Markdown: of each step, the seeds' values in order."""
    lines = [
        "| after step | tokens | agreement: change in points | accuracy: change in points | distance in nats | signals |",
        "|---|---|---|---|---|---|",
    ]
    words = {0.0: "healthy", 1.0: "watch", 2.0: "unhealthy"}
    logs = [
        {entry["step"]: entry for entry in one["log"] if "eval_agreement_mean_tokens" in entry}
        for one in results["runs"]
    ]
    statuses = [
        {entry["step"]: entry["health/status"] for entry in one["log"] if "health/status" in entry}
        for one in results["runs"]
    ]
    for step in logs[0]:
        cells = [str(step)]
        for key, scale, form in (
            ("eval_agreement_mean_tokens", 1, ".1f"),
            ("eval_agreement_change", 100, "+.1f"),
            ("eval_agreement_accuracy_change", 100, "+.1f"),
            ("eval_agreement_distance_nats", 1, ".1f"),
        ):
            values = [format(scale * log[step][key], form) for log in logs if key in log[step]]
            cells.append(", ".join(values))
        told = [words[status[step]] for status in statuses if step in status]
        lines.append(f"| {' | '.join([*cells, ', '.join(told)])} |")
    return "\n".join([*lines, "", agreement_against_accuracy(results)])


def agreement_against_accuracy(results: dict[str, Any]) -> str:
    """Return how far the change of agreement is that of accuracy, in a sentence."""
    keys = ("eval_agreement_change", "eval_agreement_accuracy_change")
    changes = 100 * np.array(
        [[entry[key] for key in keys] for run in results["runs"] for entry in run["log"] if keys[1] in entry]
    )
    difference = changes[:, 0] - changes[:, 1]
    return (
        f"Agreement against accuracy over {len(changes)} measurements: correlation of the changes {np.corrcoef(changes.T)[0, 1]:.2f}; the "
        f"change of agreement is {difference.mean():+.1f} points from that of accuracy in the mean, and at most {np.abs(difference).max():.1f}."
    )


if __name__ == "__main__":
    main()
