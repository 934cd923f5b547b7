"""SmolLM2-135M-Instruct on questions about facts: runs the quickstart with several seeds and pools them.

Writes benchmarks/results/smollm2.json, copies each run's results beside it, and puts the table into README.md. The settings
were chosen with seeds 0 to 2 on other questions, so the default seeds are others.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS = Path("benchmarks/results")
ARMS = ("base", "concise", "after")


def main() -> None:
    """Run what is missing, pool, and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2",
        description=__doc__,
        epilog="Example: python -m benchmarks.smollm2 --seeds 3 4 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="where the quickstart's runs are")
    args = parser.parse_args()
    runs = [args.output_dir / f"quickstart-seed{seed}" for seed in args.seeds]
    for seed, run in zip(args.seeds, runs, strict=True):
        if not (run / "quickstart.json").is_file():
            subprocess.run(
                ["bash", "examples/quickstart.sh", "--seed", str(seed), "--output_dir", str(run)], check=True
            )
        for arm in ARMS:
            target = RESULTS / "smollm2" / f"seed{seed}-{arm}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / arm / "results.json", target)
    pooled = ["--json", str(RESULTS / "smollm2.json"), "--readme", "README.md"]
    subprocess.run([sys.executable, "examples/quickstart.py", *map(str, runs), *pooled], check=True)


if __name__ == "__main__":
    main()
