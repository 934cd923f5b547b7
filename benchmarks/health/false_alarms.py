"""
False alarms of the guard and of the stop at the sweet spot: healthy runs of the lab, with the rule that we recommend.

A frozen teacher on the form whose checks are waste: answers become half as long, and accuracy stays. Each run is watched as a user's is
(`attach_health`), measures agreement 16 times, and may stop by itself. A run that stops, or that the guard calls lost, is a false alarm.
"""

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.environment import environment
from benchmarks.health.answers import answer_of
from benchmarks.lab.protocol import FIXTURES, sha256_of
from benchmarks.lab.run import evaluate, training_rows
from benchmarks.lab.settings import COMMON, ON_A_CPU
from benchmarks.lab.task import lab_tokenizer
from benchmarks.marked import put_between_marks
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.health.attach import attach_health
from trl_crisp.run.files import write_json

RESULT = Path("benchmarks/results/health_false_alarms.json")
FORM = "stability"
SEEDS = range(20)
# Answers are as short as the teacher's after 25 steps
CONFIG: dict[str, Any] = {
    **COMMON,
    "max_steps": 30,
    "teacher_model_kind": "base",
    "teacher_sync_steps": None,
    "monitor_prompts": 128,
    "monitor_samples": 5,
    "monitor_base_samples": 16,
    "monitor_steps": 2,
    "monitor_margin": 0.03,
    # That of the other runs of this experiment, which no complete answer reaches
    "monitor_max_new_tokens": 352,
    "stop_at_sweet_spot": True,
    "collapse_guard": True,
}
# Test problems per difficulty, before and after
TEST_PROBLEMS = 100
MEASURED = ("", "_change", "_change_low", "_change_high", "_mean_tokens")


def main() -> None:
    """Run the seeds that are missing, and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.health.false_alarms",
        description=__doc__,
        epilog="Example: OMP_NUM_THREADS=1 python -m benchmarks.health.false_alarms --work_dir outputs/false-alarms",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/false-alarms"), help="where each run's JSON goes"
    )
    parser.add_argument("--json", type=Path, default=RESULT, help=f"all runs together (default: {RESULT})")
    parser.add_argument("--readme", type=Path, help="only write what was found into this file, between its marks")
    args = parser.parse_args()
    if args.readme is not None:
        results = json.loads(args.json.read_text(encoding="utf-8"))
        args.readme.write_text(with_findings(args.readme.read_text(encoding="utf-8"), results), encoding="utf-8")
        return
    runs = []
    for seed in SEEDS:
        path = args.work_dir / f"seed{seed}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            write_json(path, run(seed))
            left = (len(SEEDS) - seed - 1) * (time.monotonic() - start) / 60
            print(f"seed {seed} of {len(SEEDS)}: about {left:.0f} min left", flush=True)
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    write_json(args.json, {"schema": "trl-crisp false alarms 1", "protocol": protocol(), "runs": runs})


def protocol() -> dict[str, Any]:
    """Return what was run."""
    return {
        "form": FORM,
        "base_sha256": sha256_of(FIXTURES / FORM),
        "config": CONFIG,
        "test_problems_a_difficulty": TEST_PROBLEMS,
        "environment": environment(),
    }


def run(seed: int) -> dict[str, Any]:
    """Train with one seed, and return what was measured and whether anything stopped the run."""
    warnings.filterwarnings("ignore")
    start = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / FORM, dtype=torch.float32)
    before = evaluate(model, TEST_PROBLEMS, False, seed)["all"]
    with tempfile.TemporaryDirectory() as output_dir:
        args = CRISPConfig(
            output_dir,
            **ON_A_CPU,
            **CONFIG,
            seed=seed,
        )
        trainer = CRISPTrainer(model=model, args=args, train_dataset=training_rows(), processing_class=lab_tokenizer())
        health = attach_health(trainer, answer_of)
        assert health.monitor is not None
        assert health.guard is not None
        assert health.sweet_spot is not None
        # One batch for all answers is twice as fast as the engine's choice
        health.monitor.settings = replace(health.monitor.settings, batch_size=640)
        trainer.train()
        log = trainer.state.log_history
        stop = health.sweet_spot.reason_to_stop(trainer.state)
        events_file = Path(output_dir) / "health_events.jsonl"
        events = events_file.read_text(encoding="utf-8").splitlines() if events_file.is_file() else []
    return {
        "seed": seed,
        "steps": trainer.state.global_step,
        "reason_of_the_stop": stop,
        "stopped_by_the_guard_at_step": health.guard.stopped_at_step,
        "test": {"before": before, "after": evaluate(trainer.model, TEST_PROBLEMS, False, seed)["all"]},
        "measurements": [
            {
                "step": entry["step"],
                **{
                    f"agreement{key}": entry[f"eval_agreement{key}"]
                    for key in MEASURED
                    if f"eval_agreement{key}" in entry
                },
            }
            for entry in log
            if "eval_agreement" in entry
        ],
        "events": [json.loads(line) for line in events],
        "cpu_s": round(time.process_time() - start, 1),
    }


def findings(results: dict[str, Any]) -> str:
    """Return what was found, as a table in Markdown."""
    runs, margin = results["runs"], results["protocol"]["config"]["monitor_margin"]
    changes = [one["agreement_change"] for run in runs for one in run["measurements"] if one["step"]]
    accuracy, tokens = (
        [_mean([run["test"][place][name] for run in runs]) for place in ("before", "after")]
        for name in ("accuracy", "mean_tokens")
    )
    return "\n".join(
        [
            "| healthy runs | stopped by the stop | by the guard | measurements | below -3 points | lowest change | accuracy before, after | tokens before, after |",
            "|---|---|---|---|---|---|---|---|",
            f"| {len(runs)} | {sum(run['reason_of_the_stop'] is not None for run in runs)} | "
            f"{sum(run['stopped_by_the_guard_at_step'] is not None for run in runs)} | {len(changes)} | "
            f"{sum(change < -margin for change in changes)} | {100 * min(changes):+.1f} points | "
            f"{accuracy[0]:.1%}, {accuracy[1]:.1%} | {tokens[0]:.1f}, {tokens[1]:.1f} |",
        ]
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def with_findings(text: str, results: dict[str, Any]) -> str:
    """Return a README with what was found between its marks."""
    return put_between_marks(text, "false-alarms", findings(results))


if __name__ == "__main__":
    main()
