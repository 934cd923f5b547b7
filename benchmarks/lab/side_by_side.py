"""Runs of the lab in parallel, each in its own process with one thread."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO


def run_side_by_side(
    runs: list[tuple[str, int]],
    workers: int,
    path_of: Callable[[str, int], Path],
    module: str = "benchmarks.lab.run",
) -> list[tuple[str, int]]:
    """
    Run settings, with a bar that shows the time left. No process is left running, even after an error.

    Args:
        runs: Setting and seed of each run.
        workers: How many runs at once.
        path_of: Returns the file of a run's result, from its setting and seed.
        module: What makes one run, from its setting, its seed and the file.

    Returns:
        The runs that failed. The end of each one's error output is printed.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    waiting = list(reversed(runs))
    running: dict[tuple[str, int], tuple[subprocess.Popen, IO[bytes]]] = {}
    failed: list[tuple[str, int]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, TimeRemainingColumn(), speed_estimate_period=3600) as progress:
        bar = progress.add_task("lab runs", total=len(runs))
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name, seed = waiting.pop()
                    command = [sys.executable, "-m", module, name, str(seed), str(path_of(name, seed))]
                    errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as its process
                    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors)
                    running[name, seed] = process, errors
                time.sleep(0.1)
                for run, (process, errors) in list(running.items()):
                    if process.poll() is None:
                        continue
                    if process.returncode:
                        failed.append(run)
                        errors.seek(0)
                        said = errors.read().decode(errors="replace")[-2000:]
                        progress.print(f"{run[0]}, seed {run[1]}, failed:\n{said}", markup=False)
                    errors.close()
                    del running[run]
                    progress.advance(bar)
        finally:
            for process, errors in running.values():
                process.kill()
                process.wait()
                errors.close()
    return failed
