"""Runs named settings of the lab through CRISPTrainer and makes the table."""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.lab.settings import SETTINGS

RESULTS = Path("benchmarks/results/lab")


def main() -> None:
    """Run what is asked for, side by side on the cores there are."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab",
        description=__doc__,
        epilog="Example: python -m benchmarks.lab frozen m20 m1 --seeds 3 --resume. Settings: " + ", ".join(SETTINGS),
    )
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="names of settings; all of them if none is given"
    )
    parser.add_argument("--seeds", type=int, default=3, help="run each setting with the seeds 0 to N-1 (default: 3)")
    parser.add_argument("--resume", action="store_true", help="skip runs whose JSON is there")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs side by side (default: the cores)"
    )
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}; the settings are {', '.join(SETTINGS)}")

    if args.one:
        _run_here(args.settings[0], args.seeds, args.output_dir)
        return
    names = args.settings or list(SETTINGS)
    runs = [(name, seed) for seed in range(args.seeds) for name in names]
    if args.resume:
        runs = [(name, seed) for name, seed in runs if not _path(args.output_dir, name, seed).exists()]
    failed = _run_all(runs, args.workers, args.output_dir)

    from benchmarks.lab.table import print_table

    print_table(args.output_dir, args.settings or None)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(f'{name} (seed {seed})' for name, seed in failed)}")


def _path(output_dir: Path, name: str, seed: int) -> Path:
    return output_dir / f"{name}-seed{seed}.json"


def _run_here(name: str, seed: int, output_dir: Path) -> None:
    from benchmarks.lab.run import run, write

    write(run(name, seed, Path("outputs") / "lab" / f"{name}-seed{seed}"), _path(output_dir, name, seed))


def _run_all(runs: list[tuple[str, int]], workers: int, output_dir: Path) -> list[tuple[str, int]]:
    """Run each in a process of its own with one thread; return those that failed."""
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

    def launch(name: str, seed: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "benchmarks.lab", name, "--one", "--seeds", str(seed)]
        return subprocess.run(
            [*command, "--output_dir", str(output_dir)], env=env, capture_output=True, text=True, check=False
        )

    failed: list[tuple[str, int]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    with (
        Progress(*columns, TimeRemainingColumn(), speed_estimate_period=3600) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        bar = progress.add_task("lab runs", total=len(runs))
        futures = {pool.submit(launch, name, seed): (name, seed) for name, seed in runs}
        for future in as_completed(futures):
            name, seed = futures[future]
            result = future.result()
            if result.returncode:
                failed.append((name, seed))
                progress.print(f"{name}, seed {seed}, failed:\n{result.stderr[-2000:]}")
            progress.advance(bar)
    return failed


if __name__ == "__main__":
    main()
