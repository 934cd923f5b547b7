"""Makes summary.json, the tables and the figure of the health experiment from the JSONs of its runs."""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.health.figure import draw
from benchmarks.health.measured import load
from benchmarks.health.summary import summarize
from benchmarks.health.tables import tables, with_tables
from trl_crisp.run.files import write_json

RESULTS = Path("benchmarks/results/health")


def without_nan(value: Any) -> Any:
    """Return a value with `None` for each NaN, and numbers with 4 decimals, as it goes to the JSON."""
    if isinstance(value, dict):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value


def main() -> None:
    """Print the tables, and write the summary and on demand the figure and the README's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description=__doc__)
    parser.add_argument("--directory", type=Path, default=RESULTS, help=f"the runs' JSONs (default: {RESULTS})")
    parser.add_argument("--figure", type=Path, help="draw one run, for example benchmarks/results/health.png")
    parser.add_argument("--readme", type=Path, help="replace the text between the tables' markers in this file")
    args = parser.parse_args()
    runs = load(args.directory)
    summary = without_nan(summarize(runs))
    write_json(args.directory / "summary.json", summary)
    if args.readme:
        args.readme.write_text(with_tables(args.readme.read_text(encoding="utf-8"), summary), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables(summary).items()))
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
