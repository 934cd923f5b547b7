"""Runs what is missing of the health experiment, the most important first. It can be stopped and started again."""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.health.run import base_directory
from benchmarks.health.settings import SETTINGS, planned_runs
from benchmarks.lab.side_by_side import run_side_by_side

RESULTS = Path("benchmarks/results/health")


def main() -> None:
    """Run the missing runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.health.run_all", description=__doc__, epilog="Settings: " + ", ".join(SETTINGS)
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="only these; all of the plan if none is given")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs (default: 2)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help=f"directory (default: {RESULTS})")
    args = parser.parse_args()
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}; the settings are {', '.join(SETTINGS)}")

    def path_of(name: str, seed: int) -> Path:
        return args.output_dir / f"{name}-seed{seed}.json"

    runs = [
        run for run in planned_runs() if not path_of(*run).exists() and (not args.settings or run[0] in args.settings)
    ]
    for name in {name for name, _ in runs if not base_directory(SETTINGS[name]).is_dir()}:
        print(f"{name} is left out: {base_directory(SETTINGS[name])} is not there, see benchmarks.health.weak_base")
        runs = [run for run in runs if run[0] != name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failed = run_side_by_side(runs, args.workers, path_of, "benchmarks.health.run")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The finished runs are kept; the same command runs the rest.")
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(f'{name} (seed {seed})' for name, seed in failed)}")


if __name__ == "__main__":
    main()
