"""The runs of the health experiment: which base, how often the teacher is due for a refresh, and who decides about it."""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.lab.settings import COMMON

# 640 answers. An interval of 64 prompts with 5 answers was 5 points wide to each side in a first measurement, which is too much for
# a margin of 3 points
MONITOR_PROMPTS = 128
MONITOR_SAMPLES = 5
MONITOR_MARGIN = 0.03
# The rollouts are cut at 160 tokens, as in the lab, which cuts 40% of the base's answers. The monitor's are never cut before the end of
# a complete answer, as those of the lab's evaluation
MONITOR_MAX_NEW_TOKENS = 352
# A run with as many answers per prompt shows what more than five would bring
MANY_SAMPLES = 8
# A stricter gate. With 5 answers of the base its level seems 0.7 points too low, which is much of this margin, so it has more
STRICT_MARGIN = 0.01
STRICT_BASE_SAMPLES = 16
# More answers of the base to the prompts of seed 0, for the power calculation
MORE_BASE_SAMPLES = 11
# Held-out test problems per difficulty, at each measurement. The first run had 50
HELD_OUT_PROBLEMS = 20


@dataclass(frozen=True)
class Setting:
    """
    One run but for its seed.

    Attributes:
        form: The form of the lab's task.
        arm: `"ungated"`, `"gated"` or `"frozen"`.
        sync_steps: M; `None` for a frozen teacher.
        steps: Optimizer steps.
        monitor_steps: Steps between two measurements.
        base: `"full"`, the lab's own, or the aim of a base that was stopped early, in percent.
        samples: K, the answers to each monitor prompt.
        base_samples: The base's answers to each monitor prompt; `None` for K.
        margin: `monitor_margin`, a share.
        more_base_samples: Further answers of the base to each monitor prompt, with seed 0. The run does not use them.
    """

    form: str
    arm: str
    sync_steps: int | None
    steps: int
    monitor_steps: int = 10
    base: str = "full"
    samples: int = MONITOR_SAMPLES
    base_samples: int | None = None
    margin: float = MONITOR_MARGIN
    more_base_samples: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Fields of `CRISPConfig` without the seed."""
        fields: dict[str, Any] = {"teacher_model_kind": "base"} if self.arm == "frozen" else {}
        if self.base_samples is not None:
            fields["monitor_base_samples"] = self.base_samples
        return {
            **COMMON,
            "max_steps": self.steps,
            "teacher_sync_steps": self.sync_steps,
            **fields,
            "monitor_prompts": MONITOR_PROMPTS,
            "monitor_samples": self.samples,
            "monitor_steps": self.monitor_steps,
            "monitor_margin": self.margin,
            "teacher_refresh_gate": "agreement" if self.arm == "gated" else None,
        }


def _settings() -> dict[str, Setting]:
    found = {}
    for form in ("tradeoff", "stability"):
        found[f"{form}-m20-ungated"] = Setting(form, "ungated", 20, 150, more_base_samples=MORE_BASE_SAMPLES)
        # The gate looks at the measurements just before due refreshes, so those between them change nothing
        found[f"{form}-m20-gated"] = Setting(form, "gated", 20, 150, monitor_steps=20)
        found[f"{form}-m20-strict-gated"] = replace(
            found[f"{form}-m20-gated"], base_samples=STRICT_BASE_SAMPLES, margin=STRICT_MARGIN
        )
        for arm in ("ungated", "gated"):
            found[f"{form}-m10-{arm}"] = Setting(form, arm, 10, 150)
            found[f"{form}-m5-{arm}"] = Setting(form, arm, 5, 60, monitor_steps=5)
        found[f"{form}-m50-ungated"] = Setting(form, "ungated", 50, 150)
        found[f"{form}-m50-gated"] = Setting(form, "gated", 50, 150, monitor_steps=50)
        found[f"{form}-frozen"] = Setting(form, "frozen", None, 150, monitor_steps=30)
        found[f"{form}-m1-ungated"] = Setting(form, "ungated", 1, 40, monitor_steps=5)
        for base in ("75", "50"):
            found[f"{form}-{base}-m20-ungated"] = Setting(form, "ungated", 20, 150, monitor_steps=20, base=base)
        found[f"{form}-m20-k8-ungated"] = Setting(form, "ungated", 20, 150, monitor_steps=20, samples=MANY_SAMPLES)
    return found


SETTINGS = _settings()


def planned_runs() -> list[tuple[str, int]]:
    """Return setting and seed of each run, the most important first."""
    forms = ("tradeoff", "stability")
    m20 = [f"{form}-m20-{arm}" for form in forms for arm in ("gated", "ungated")]
    m10 = [f"{form}-m10-{arm}" for form in forms for arm in ("gated", "ungated")]
    m5_m50 = [f"{form}-{sync}-{arm}" for sync in ("m5", "m50") for form in forms for arm in ("gated", "ungated")]
    strict = [f"{form}-m20-strict-gated" for form in forms]
    many = [f"{form}-m20-k8-ungated" for form in forms]
    frozen = [f"{form}-frozen" for form in forms]
    weak = [f"{form}-{base}-m20-ungated" for form in forms for base in ("50", "75")]
    m1 = [f"{form}-m1-ungated" for form in forms]
    blocks = [(m20, 0), (frozen, 0), (m20, 1), (weak, 0), (m1, 0), (m10, 0), (m20, 2), (m10, 1), (m10, 2)]
    blocks += [(frozen, 1), (frozen, 2), (m20, 3), (m20, 4), (frozen, 3), (frozen, 4), (m10, 3), (m10, 4)]
    blocks += [*((strict, seed) for seed in range(5)), (many, 0), *((m5_m50, seed) for seed in range(5))]
    blocks += [(names, seed) for names in (m1, weak) for seed in range(1, 5)]
    return [(name, seed) for names, seed in blocks for name in names]
