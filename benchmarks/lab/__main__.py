"""Runs settings of the lab with CRISPTrainer and prints the table."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from benchmarks.lab.protocol import check_protocol
from benchmarks.lab.settings import SETTINGS
from benchmarks.lab.side_by_side import run_side_by_side
from benchmarks.lab.table import print_table

RESULTS = Path("benchmarks/results/lab")


def main() -> None:
    """Run the requested settings in parallel on the machine's cores."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab",
        description=__doc__,
        epilog="Example: python -m benchmarks.lab untrained frozen m20 --seeds 3 --resume. Settings: "
        + ", ".join(SETTINGS),
    )
    parser.add_argument(
        "settings", nargs="*", metavar="SETTING", help="names of settings; all of them if none is given"
    )
    parser.add_argument(
        "--seeds", type=_at_least_one, default=3, help="run each setting with the seeds 0 to N-1 (default: 3)"
    )
    parser.add_argument("--resume", action="store_true", help="skip runs whose JSON exists")
    parser.add_argument(
        "--workers", type=_at_least_one, default=os.cpu_count() or 1, help="parallel runs (default: number of cores)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=RESULTS, help=f"directory of the JSONs (default: {RESULTS})"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}; the settings are {', '.join(SETTINGS)}")

    def path_of(name: str, seed: int) -> Path:
        return args.output_dir / f"{name}-seed{seed}.json"

    names = list(dict.fromkeys(args.settings)) or list(SETTINGS)
    runs = [(name, seed) for seed in range(args.seeds) for name in names]
    # A result of another protocol is reported now, not hours later when the table is made
    for path in sorted(args.output_dir.glob("*-seed*.json")):
        if args.resume or path not in [path_of(*run) for run in runs]:
            try:
                check_protocol(path, json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                sys.exit(str(error))
    if args.resume:
        runs = [run for run in runs if not path_of(*run).exists()]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # A shell may start a background command with SIGINT ignored. A SIGINT that is sent to this process is meant for it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        failed = run_side_by_side(runs, args.workers, path_of)
    except KeyboardInterrupt:
        sys.exit("\nStopped. The finished runs are kept; the same command with --resume runs the rest.")
    print_table(args.output_dir, args.settings or None)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(f'{name} (seed {seed})' for name, seed in failed)}")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1: give 1 or more")
    return number


if __name__ == "__main__":
    main()
