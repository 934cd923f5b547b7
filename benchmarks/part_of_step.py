"""What the benchmarks of one part of a step on CPUs share: the config of the training, the command line, and the record of it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import environment
from benchmarks.steps import name_of

if TYPE_CHECKING:
    from trl_crisp import CRISPConfig

# Rollouts of a step, of all processes together
ROLLOUTS = 4


def config_of(directory: str, steps: int, tokens: int, processes: int = 1, **fields: Any) -> "CRISPConfig":
    """Return the config of a training in float32 on CPUs that logs the seconds of each step's parts, and saves nothing."""
    from trl_crisp import CRISPConfig

    return CRISPConfig(
        directory,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        instruction="v1",
        per_device_train_batch_size=ROLLOUTS // processes,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=1e-6,
        max_completion_length=tokens,
        profile_steps=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **fields,
    )


def parser_of(module: str, description: str | None, result: Path, rounds: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"Example: python -m {module} --model smollm2 (the directory that examples/get_smollm2.py wrote)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a Hub id or a directory; the committed result is SmolLM2-135M's"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help=f"measured steps of each case ({rounds}), after one for warming up",
    )
    parser.add_argument("--json", type=Path, default=result)
    return parser


def record_of(schema: str, args: argparse.Namespace, **protocol: Any) -> dict[str, Any]:
    """Return the JSON's content before the first case is measured."""
    return {
        "schema": f"trl-crisp {schema}",
        "protocol": {
            "model": name_of(args.model),
            "dtype": "float32",
            "rollouts_a_step": ROLLOUTS,
            "completions": "made up, all of the full length",
            "measured_steps": args.rounds,
            "warm_up_steps": 1,
            **protocol,
            **environment(),
        },
        "cases": {},
    }
