"""What the benchmarks of time and memory share: quantiles, the memory of this process, and what a measurement ran on."""

import os
import platform
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "speed"
PACKAGES = ("trl-crisp", "trl", "transformers", "torch", "accelerate", "peft", "numpy")
MIB = 2**20


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p20, p50 and p80."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def rss_mib() -> float:
    """Return the memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def peak_rss_mib() -> float:
    """Return the most memory that this process has held since its start, or since [`forget_peak_rss`]."""
    # Not ru_maxrss, which a new process takes over from the one that started it
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak.split()[1]) / 1024


def forget_peak_rss() -> None:
    """Start the peak of this process's memory anew, from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def cpu_name() -> str:
    """Return the processor's name and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def environment() -> dict[str, Any]:
    """Return when, on which machine, and with which code and packages a measurement runs."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "trl_crisp"], capture_output=True, text=True).stdout
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit,
        "uncommitted_changes_in_package": bool(changed.strip()),
    }
