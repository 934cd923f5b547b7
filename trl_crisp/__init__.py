"""CRISP (arXiv 2603.05433) on TRL: a model learns from itself, told to be concise."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["INSTRUCTIONS", "BenchmarkCallback", "CRISPConfig", "CRISPTrainer", "EvaluationSettings", "__version__"]

if TYPE_CHECKING:
    from trl_crisp.config import CRISPConfig
    from trl_crisp.evaluation.settings import EvaluationSettings
    from trl_crisp.health.measuring import BenchmarkCallback
    from trl_crisp.prompts.instructions import INSTRUCTIONS
    from trl_crisp.trainer import CRISPTrainer

_HOMES = {
    "BenchmarkCallback": "health.measuring",
    "CRISPConfig": "config",
    "CRISPTrainer": "trainer",
    "EvaluationSettings": "evaluation.settings",
    "INSTRUCTIONS": "prompts.instructions",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `import trl_crisp` does not import torch
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"trl_crisp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trl_crisp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
