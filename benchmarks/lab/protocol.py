"""The protocol of a lab run: its settings and its measurement. It is kept in the result, and compared before the result is used."""

import hashlib
from pathlib import Path
from typing import Any

from benchmarks.lab.settings import COMMON, SETTINGS
from benchmarks.lab.task import DIFFICULTIES, MAX_SOLUTION_TOKENS

FIXTURES = Path(__file__).parent / "fixtures"
# Test problems per difficulty: at the end of a run, and for the curves during a run
FINAL_PROBLEMS = 100
CURVE_PROBLEMS = 20


def sha256_of(directory: Path) -> str:
    """Return the hash of a saved model's weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def protocol_of(name: str, seed: int) -> dict[str, Any]:
    """Return all that determines the result of a setting and a seed, except the machine and the package versions."""
    setting = SETTINGS[name]
    return {
        "form": setting.form,
        "base_sha256": sha256_of(FIXTURES / setting.form),
        "config": {**COMMON, **setting.overrides, "seed": seed},
        "lora_rank": setting.lora_rank,
        "mask_truncated": setting.mask_truncated,
        "evaluation": {
            "problems_a_difficulty": FINAL_PROBLEMS,
            "difficulties": list(DIFFICULTIES),
            "temperature": 1.0,
            "samples": 1,
            "max_new_tokens": MAX_SOLUTION_TOKENS,
            "grader": "the solution's last words are `so answer SUM`",
        },
    }


def check_protocol(path: Path, result: dict[str, Any]) -> None:
    """
    Check that a result was made with the current protocol of its setting.

    Args:
        path: The result's file.
        result: The file's content.

    Raises:
        ValueError: If the setting is unknown, or the result's protocol differs from the setting's.
    """
    name, seed = result["setting"], result["seed"]
    if name not in SETTINGS:
        raise ValueError(
            f"{path} is of the setting {name!r}, which is not one of {', '.join(SETTINGS)}: remove the file."
        )
    for key, value in protocol_of(name, seed).items():
        found = result["protocol"].get(key)
        if found != value:
            raise ValueError(
                f"{path} was made with {key} = {found!r}, and {name} with seed {seed} now has {value!r}: remove the "
                "file to run the setting again."
            )
