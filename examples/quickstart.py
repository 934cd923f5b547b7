"""Summarizes examples/quickstart.sh: one table, two answers and a figure, from one run or from several seeds.

Each run is a directory with the output of the quickstart's commands: base/, concise/ and after/ (`trl-crisp eval`) and model/
(`trl-crisp train`). Runs of different seeds are pooled: the answers to a question are averaged first, and intervals are over
questions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from trl_crisp.evaluation.metrics import Interval, paired_bootstrap_difference, paired_bootstrap_reduction
from trl_crisp.evaluation.results import load_results
from trl_crisp.report.figures import completion_length_figure
from trl_crisp.run.files import write_json

ARMS = {"base": "base", "concise": "base, told to be concise", "after": "after CRISP"}
QUESTIONS = Path(__file__).parent / "facts" / "test.jsonl"
FLAGS = {"first_sentence": "correct", "anywhere": "anywhere_correct"}
# Fields of the protocol that may differ between the runs, or between before and after
_NOT_COMMON = {"seed", "model", "model_revision", "weights_sha256", "instruction", "base_model"}
README_START, README_END = "<!-- quickstart table -->", "<!-- /quickstart table -->"


def main() -> None:
    """Print the table, draw the figures, and write the files that the options name."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python examples/quickstart.py outputs/quickstart-seed0 outputs/quickstart-seed1 --json pooled.json",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories of examples/quickstart.sh")
    parser.add_argument("--json", type=Path, help="write all numbers and the protocol to this file")
    parser.add_argument("--readme", type=Path, help="replace the text between the table's markers in this file")
    args = parser.parse_args()
    result = summarize(args.runs)
    print(render(result, args.json))
    for run in args.runs:
        history = json.loads((run / "model" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        figure = completion_length_figure(history, run / "length.png")
        print(f"Figure of the rollouts' length during training: {figure}")
    if args.json:
        write_json(args.json, result)
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        before, rest = text.split(README_START)
        after = rest.split(README_END)[1]
        args.readme.write_text(
            f"{before}{README_START}\n{render(result, args.json)}{README_END}{after}", encoding="utf-8"
        )


def summarize(runs: list[Path]) -> dict[str, Any]:
    """
    Pool the results of several runs.

    Args:
        runs: Directories of examples/quickstart.sh, with different seeds.

    Returns:
        The protocol; for each arm, and for its change from the base, estimate and 95% interval of the mean tokens and of both
        accuracies; each run's own numbers; one question with its answers.

    Raises:
        ValueError: If the runs differ in their questions or protocols, or have the same seed.
    """
    results = [{arm: load_results(run / arm) for arm in ARMS} for run in runs]
    protocols = [
        {k: v for k, v in r[arm]["protocol"].items() if k not in _NOT_COMMON} for r in results for arm in ARMS
    ]
    if differing := sorted(
        {k for p in protocols for k in p.keys() | protocols[0].keys() if p.get(k) != protocols[0].get(k)}
    ):
        raise ValueError(f"the runs differ in {', '.join(differing)}: pool only runs of the same protocol.")
    seeds = [r["base"]["protocol"]["seed"] for r in results]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"the runs have the seeds {seeds}: a repeated seed makes the intervals too narrow. Give each once."
        )
    measures = {arm: _measures([r[arm] for r in results]) for arm in ARMS}
    arms: dict[str, Any] = {}
    for arm, values in measures.items():
        arms[arm] = {name: _mean(value) for name, value in values.items()}
        if arm != "base":
            base = measures["base"]
            arms[arm]["change"] = {
                "tokens": _as_dict(paired_bootstrap_reduction(base["tokens"], values["tokens"]), -1)
            } | {flag: _as_dict(paired_bootstrap_difference(base[flag], values[flag])) for flag in FLAGS}
    return {
        "protocol": {
            **protocols[0],
            "seeds": seeds,
            "questions": len(measures["base"]["tokens"]),
            "samples": results[0]["base"]["samples"],
            "instruction": results[0]["concise"]["protocol"]["instruction"],
        },
        "training": _training(runs[0]),
        "arms": arms,
        "by_seed": {
            str(seed): {
                arm: {name: float(value.mean()) for name, value in _measures([r[arm]]).items()} for arm in ARMS
            }
            for seed, r in zip(seeds, results, strict=True)
        },
        "example": _example(runs[0], results[0]),
    }


def render(result: dict[str, Any], source: Path | None = None) -> str:
    """Return the table, the protocol in a line, and the example, as Markdown."""
    arms, protocol, training = result["arms"], result["protocol"], result["training"]
    lines = [
        "| model and prompt | mean tokens [95% interval] | right in the first sentence | right anywhere |",
        "|---|---|---|---|",
    ]
    for arm, name in ARMS.items():
        shares = [_share(arms[arm][flag]) for flag in FLAGS]
        lines.append(f"| {name} | {_tokens(arms[arm]['tokens'])} | {' | '.join(shares)} |")
    for arm in ("concise", "after"):
        change = arms[arm]["change"]
        tokens = (
            f"{change['tokens']['estimate']:+.0%} [{change['tokens']['low']:+.0%}, {change['tokens']['high']:+.0%}]"
        )
        points = [_points(change[flag]) for flag in FLAGS]
        lines.append(f"| {ARMS[arm]} against base, paired | {tokens} | {' | '.join(points)} |")
    seeds = len(protocol["seeds"])
    example = result["example"]
    return "\n".join(
        [
            *lines,
            "",
            f"Protocol: {protocol['questions']} held-out questions, {protocol['samples']} answer{'s' * (protocol['samples'] > 1)} "
            f"each per seed, {seeds} seed{'s' * (seeds > 1)} pooled, temperature {protocol['temperature']}, at most "
            f"{protocol['max_new_tokens']} tokens; {training['max_steps']} steps of {training['rollouts']} rollouts, full "
            f'fine-tuning at {training["learning_rate"]:g}, told "{protocol["instruction"]}"; 95% intervals by bootstrap over '
            f"questions{f' ([JSON]({source.as_posix()}))' if source else ''}.",
            "",
            f"- Question: {example['question']}",
            f"- Before, {example['before_tokens']} tokens: {example['before']}",
            f"- After, {example['after_tokens']} tokens: {example['after']}",
            "",
        ]
    )


def _measures(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return tokens and flags, each [questions, seeds x samples]."""
    budget = str(results[0]["protocol"]["max_new_tokens"])
    ids = [problem["id"] for problem in results[0]["problems"]]
    columns: dict[str, list[list[float]]] = {name: [] for name in ("tokens", *FLAGS)}
    for result in results:
        if [problem["id"] for problem in result["problems"]] != ids:
            raise ValueError("the runs have different questions: pool only runs of the same file and limit.")
        for number in range(result["samples"]):
            samples = [problem["samples"][number] for problem in result["problems"]]
            columns["tokens"].append([sample["tokens"] for sample in samples])
            for name, flag in FLAGS.items():
                columns[name].append([float(sample["grades"][budget][flag]) for sample in samples])
    return {name: np.array(values).T for name, values in columns.items()}


def _mean(values: np.ndarray) -> dict[str, float]:
    return _as_dict(paired_bootstrap_difference(np.zeros(len(values)), values))


def _as_dict(interval: Interval, sign: int = 1) -> dict[str, float]:
    low, high = sorted((sign * interval.low, sign * interval.high))
    return {"estimate": sign * interval.estimate, "low": low, "high": high}


def _training(run: Path) -> dict[str, Any]:
    import torch

    args = torch.load(run / "model" / "training_args.bin", weights_only=False)
    return {
        "learning_rate": args.learning_rate,
        "max_steps": args.max_steps,
        "rollouts": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "max_completion_length_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "teacher_sync_steps": args.teacher_sync_steps,
    }


def _example(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Return an example: of the questions answered correctly before and after, the one with the median shortening."""
    texts = {arm: _texts(run / arm) for arm in ("base", "after")}
    budget = str(results["base"]["protocol"]["max_new_tokens"])
    first = {arm: {p["id"]: p["samples"][0] for p in results[arm]["problems"]} for arm in ("base", "after")}

    def is_told(identifier: str) -> bool:
        return (
            all(first[arm][identifier]["grades"][budget]["correct"] for arm in first)
            and first["base"][identifier]["ended_by_eos"]
        )

    told = [identifier for identifier in first["base"] if is_told(identifier)] or list(first["base"])
    told.sort(key=lambda one: first["after"][one]["tokens"] / first["base"][one]["tokens"])
    chosen = told[len(told) // 2]
    return {
        "id": chosen,
        "question": _question(chosen),
        "before": " ".join(texts["base"][chosen].split()),
        "before_tokens": first["base"][chosen]["tokens"],
        "after": " ".join(texts["after"][chosen].split()),
        "after_tokens": first["after"][chosen]["tokens"],
    }


def _question(identifier: str) -> str:
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        if (row := json.loads(line))["id"] == identifier:
            return row["question"]
    raise ValueError(f"{QUESTIONS} has no question {identifier!r}: the results were measured on another file.")


def _texts(directory: Path) -> dict[str, str]:
    """Return the first answer to each question."""
    lines = (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    samples = [json.loads(line) for line in lines]
    return {sample["problem"]: sample["text"] for sample in samples if sample["number"] == 0}


def _tokens(values: dict[str, float]) -> str:
    return f"{values['estimate']:.1f} [{values['low']:.1f}, {values['high']:.1f}]"


def _share(values: dict[str, float]) -> str:
    return f"{values['estimate']:.1%} [{values['low']:.1%}, {values['high']:.1%}]"


def _points(values: dict[str, float]) -> str:
    return f"{100 * values['estimate']:+.1f} points [{100 * values['low']:+.1f}, {100 * values['high']:+.1f}]"


if __name__ == "__main__":
    main()
