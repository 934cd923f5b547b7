"""Arguments of `trl-crisp report`."""

import argparse
from pathlib import Path


def make_report_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-crisp report`."""
    parser = argparse.ArgumentParser(
        prog="trl-crisp report",
        description="Write one page about results of `trl-crisp eval` and a training: a verdict, tables, figures, and answers side by side. "
        "It is a single file that needs no network.",
        epilog="example:\n  trl-crisp report base concise after --run qwen3-0.6b-crisp --output report.html\n"
        "  trl-crisp report base after-seed0 after-seed1 --output seeds.html\n\n"
        "The first RESULT is the base. One of the same weights with an instruction is shown as told to be concise; all others are shown as "
        "trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "results",
        metavar="RESULT",
        type=Path,
        nargs="*",
        help="an --output directory of `trl-crisp eval`, or its results.json; the base first",
    )
    add(
        "--run",
        metavar="OUTPUT_DIR",
        type=Path,
        action="append",
        default=[],
        help="output_dir of a training, of which the log is drawn; may be given again",
    )
    add(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="report.html writes the page and report.md beside it; report.md writes Markdown alone",
    )
    return parser
